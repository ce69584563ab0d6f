"""Figures that compare images by their features: pure functions of tensors on any device.

features, pixels, ...: float `[N, D]`, one row per image. docs/evaluation.md says what each figure detects and what it does not.
"""

import torch
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

BLOCK = 1000  # rows of a distance matrix that are in memory at once
NEIGHBOURS = 10_000  # at most so many real and generated images for the figures that compare all pairs


# ---- Frechet distance -------------------------------------------------------------------------------------------------------


def statistics(features):
    """(mean `[D]`, covariance `[D, D]`) of `features`, in float64."""
    return features.double().mean(0), features.double().T.cov()


def frechet_distance(ours, reference):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two pairs (mean, covariance), a float (Heusel et al. 2017, arXiv 1706.08500).

    The trace of the root is the sum of the roots of the eigenvalues of C2^(1/2) C1 C2^(1/2), which is symmetric.
    """
    (mean, covariance), (reference_mean, reference_covariance) = ours, reference
    values, vectors = torch.linalg.eigh(reference_covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
    distance = (mean - reference_mean).square().sum() + covariance.trace() + reference_covariance.trace() - 2 * cross
    return distance.item()


def inception_score(logits):
    """Salimans et al. 2016 (arXiv 1606.03498), by torch-fidelity, of Inception's logits `[N, 1008]`; a float."""
    return isc_features_to_metric(logits.cpu())[KEY_METRIC_ISC_MEAN]


# ---- neighbours -------------------------------------------------------------------------------------------------------------


def distances(a, b):
    """Blocks `[at most BLOCK, len(b)]` of the Euclidean distances between the rows of `a` and those of `b`, in float64.

    They come from a matrix product, which TF32 would round to three digits on CUDA.
    """
    b = b.double()
    return (torch.cdist(block.double(), b) for block in a.split(BLOCK))


def nearest(a, b, k=1):
    """The distance of each row of `a` to its k-th nearest row of `b`, `[len(a)]`."""
    return torch.cat([block.kthvalue(min(k, len(b)), dim=1).values for block in distances(a, b)])


def inside(a, b, radii):
    """For each row of `a`, how many of the balls of radius `radii` `[len(b)]` around the rows of `b` contain it, `[len(a)]`."""
    return torch.cat([(block <= radii).sum(1) for block in distances(a, b)])


def precision_recall(real, fake, k=3):
    """Kynkaanniemi et al. 2019 (arXiv 1904.06991), two floats.

    Precision: share of the fake images that are no farther from some real image than its k-th nearest real neighbour. Recall: the
    same with real and fake exchanged.
    """
    precision = inside(fake, real, nearest(real, real, k + 1)) > 0  # the nearest of all is the image itself
    recall = inside(real, fake, nearest(fake, fake, k + 1)) > 0
    return precision.float().mean().item(), recall.float().mean().item()


def density_coverage(real, fake, k=5):
    """Naeem et al. 2020 (arXiv 2002.09797), two floats.

    Density: the mean number of real images whose k-neighbourhood contains a fake image, divided by k. It is 1 for the real
    distribution, and larger if fake images crowd. Coverage: share of the real images whose neighbourhood contains a fake one.
    """
    radii = nearest(real, real, k + 1)
    density = inside(fake, real, radii).float().mean() / k
    return density.item(), (nearest(real, fake) <= radii).float().mean().item()


# ---- all figures ------------------------------------------------------------------------------------------------------------


def within_class_spread(pixels, labels):
    """The variance of the images of a class around their mean, summed over the pixels, averaged over the classes; a float.

    Images in [-1, 1]. Classes with fewer than two images are left out.
    """
    spreads = [part.var(0).sum() for label in labels.unique() if len(part := pixels[labels == label]) > 1]
    return torch.stack(spreads).mean().item() if spreads else 0.0


def figures(seen, labels, reference):
    """All figures of images that were generated for `labels` `[N]`: a dict of floats.

    seen: a dict of these images' `features` (Inception's or the judge's, or `small`), `logits` (the judge's), `pixels`, `small`
    (averaged pixels) and `neighbours` (`features` or `small`, for the figures that compare all pairs), all `[N, ...]`. Without
    `logits`, as for a network without classes, the figures `own_label` and `within_class_spread` are left out.
    reference: a dict of real training images' `features` and `small` as pairs (mean, covariance); `neighbours` `[M, D]`, of which
    as many as generated images are used; `training`, the `small` of all that a generator could have copied; and `copied_below`:
    one in a hundred held-out real images is closer than this to the nearest of `training`.
    """
    real, fake = reference["neighbours"][: len(labels)], seen["neighbours"][:NEIGHBOURS]
    precision, recall = precision_recall(real, fake)
    density, coverage = density_coverage(real, fake)
    copied = nearest(seen["small"][:NEIGHBOURS], reference["training"]) < reference["copied_below"]
    of_classes = {}
    if "logits" in seen:
        of_classes["own_label"] = (seen["logits"].argmax(1) == labels).float().mean().item()
        of_classes["within_class_spread"] = within_class_spread(seen["pixels"], labels)
    return {
        "frechet_distance": frechet_distance(statistics(seen["features"]), reference["features"]),
        "pixel_frechet_distance": frechet_distance(statistics(seen["small"]), reference["small"]),
        "precision": precision,
        "recall": recall,
        "density": density,
        "coverage": coverage,
        **of_classes,
        "near_copies": copied.float().mean().item(),
    }


def figures_with_noise(seen, labels, reference, size, draws=8):
    """(`figures`, the standard deviation of each): the images are split into parts of `size`, and the parts' figures averaged.

    The deviation comes from the figures of random halves of a part. For a mean it is the standard error of the whole part (the
    delete-half jackknife). It covers the choice of images, not that of the training's seed.
    """
    parts = [torch.arange(start, start + size, device=labels.device) for start in range(0, len(labels) - size + 1, size)]

    def of(index):
        return figures({name: rows[index] for name, rows in seen.items()}, labels[index], reference)

    wholes = [of(part) for part in parts]
    random = torch.Generator().manual_seed(0)
    halves = [of(parts[draw % len(parts)][torch.randperm(size, generator=random)[: size // 2]]) for draw in range(draws)]
    values = {name: sum(whole[name] for whole in wholes) / len(wholes) for name in wholes[0]}
    noise = {name: torch.tensor([half[name] for half in halves]).std().item() / len(parts) ** 0.5 for name in values}
    return values, noise


# ---- verdict ----------------------------------------------------------------------------------------------------------------

BETTER = {  # which direction is better; None: closer to real images
    "frechet_distance": min,
    "pixel_frechet_distance": min,
    "precision": max,
    "recall": max,
    "density": None,
    "coverage": max,
    "own_label": max,
    "within_class_spread": None,
    "near_copies": min,
}


def verdict(student, teacher, real):
    """In which figures the student is better than its teacher, worse, or as good: a dict from these words to lists of names.

    Each argument is a row with the figures and their `noise`. Two figures differ if they are more than three standard deviations
    of their difference apart. At two, two of five comparisons of equally good models would find a difference.
    """
    result = {"better": [], "worse": [], "as good": []}
    for name in student["noise"]:
        better = BETTER[name]
        values = [row[name] if better else abs(row[name] - real[name]) for row in (student, teacher)]
        noise = (student["noise"][name] ** 2 + teacher["noise"][name] ** 2) ** 0.5
        if abs(values[0] - values[1]) <= 3 * noise:
            result["as good"].append(name)
        else:
            result["better" if (better or min)(values) == values[0] else "worse"].append(name)
    return result


def best(rows):
    """The index of the best of several rows: the one with the least mean rank in both Frechet distances, recall and coverage.

    Two of the four mainly detect lost diversity. Of equal rows, the one with the lesser Frechet distance is best.
    """
    ranks = [0] * len(rows)
    for name in ("frechet_distance", "pixel_frechet_distance", "recall", "coverage"):
        sign = -1 if BETTER[name] is max else 1
        for index, row in enumerate(rows):
            ranks[index] += sum(sign * other[name] < sign * row[name] for other in rows)
    return min(range(len(rows)), key=lambda index: (ranks[index], rows[index]["frechet_distance"]))
