"""Metrics that compare images by their features: pure functions of tensors on any device.

features, small, ...: float `[N, D]`, one row per image. docs/evaluation.md says what each metric detects and what not.
"""

import torch

BLOCK = 1000  # rows of a distance matrix that are in memory at once
NEIGHBOURS = 10_000  # at most so many real and generated images for the metrics that compare all pairs
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
RANKED = ["frechet_distance", "pixel_frechet_distance", "recall", "coverage"]  # of checkpoints: quality and variety


def statistics(features):
    """(mean `[D]`, covariance `[D, D]`) of `features`, in float64."""
    return features.double().mean(0), features.double().T.cov()


def with_root(mean, covariance):
    """The triple (mean, covariance, its symmetric square root), which `frechet_distance` takes as a reference."""
    values, vectors = torch.linalg.eigh(covariance)
    return mean, covariance, vectors * values.clamp(min=0).sqrt() @ vectors.T


def frechet_distance(features, reference):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), a float (Heusel et al. 2017, arXiv 1706.08500).

    m1, C1: of `features`; reference: m2, C2 and its root R, from `with_root`. With C1 = X^T X, X the centred features,
    the trace is the sum of the roots of the eigenvalues of (X R)^T (X R), or of (X R) (X R)^T, if that is smaller.
    """
    m2, C2, root = reference
    m1 = features.double().mean(0)
    centred = (features - m1) / (len(features) - 1) ** 0.5
    product = centred @ root
    square = product @ product.T if len(product) < len(root) else product.T @ product
    cross = torch.linalg.eigvalsh(square).clamp(min=0).sqrt().sum()
    return ((m1 - m2).square().sum() + centred.square().sum() + C2.trace() - 2 * cross).item()


def distances(a, b):
    """Blocks `[at most BLOCK, len(b)]` of the Euclidean distances between the rows of `a` and those of `b`, in float64.

    They come from matrix products. In float32 these would lose the distances of images that are nearly equal.
    """
    b = b.double()
    return (torch.cdist(block.double(), b) for block in a.split(BLOCK))


def nearest(a, b):
    """The distance of each row of `a` to the nearest row of `b`, `[len(a)]`."""
    return torch.cat([block.amin(1) for block in distances(a, b)])


def radii(points, *ks):
    """For each k in `ks`, the distance of each of the `points` to its k-th nearest other: `[len(ks), N]`."""
    ks = [min(k, len(points) - 1) for k in ks]  # the nearest of all is the point itself
    return torch.cat([block.topk(max(ks) + 1, largest=False).values[:, ks].T for block in distances(points, points)], 1)


def neighbour_metrics(real, fake, real_radii, ks=(3, 5)):
    """A dict of four metrics. The ball of an image reaches to its k-th nearest other of its kind, real or fake.

    precision: share of the fake images that are in some real ball (Kynkaanniemi et al. 2019, arXiv 1904.06991);
    recall: share of the real images that are in some fake ball; both with the first of `ks`;
    density: mean number of real balls that a fake image is in, divided by k (Naeem et al. 2020, arXiv 2002.09797): 1
    for the real distribution, more if fake images crowd;
    coverage: share of the real balls that contain a fake image; both with the second of `ks`.
    real_radii: `radii(real, *ks)`. A ball contains its surface (Naeem's code leaves it out).
    """
    precise, dense = [], []
    recalled, closest = torch.zeros_like(real_radii[0], dtype=bool), torch.full_like(real_radii[0], torch.inf)
    for block, fake_radii in zip(distances(fake, real), radii(fake, ks[0])[0].split(BLOCK), strict=True):
        precise.append((block <= real_radii[0]).any(1))
        dense.append((block <= real_radii[1]).sum(1))
        recalled |= (block <= fake_radii[:, None]).any(0)
        closest = torch.minimum(closest, block.amin(0))
    shares = {"precision": torch.cat(precise), "recall": recalled, "density": torch.cat(dense) / ks[1]}
    shares["coverage"] = closest <= real_radii[1]
    return {name: values.double().mean().item() for name, values in shares.items()}


def within_class_spread(images, labels):
    """The variance of the images of a class around their mean, summed over pixels, averaged over classes; a float.

    images: uint8 `[N, ...]`; the variance is that of their values in [-1, 1]. Classes with one image are left out.
    """
    parts = [images[labels == label].flatten(1).double() for label in labels.unique()]
    spreads = [part.var(0).sum() / 127.5**2 for part in parts if len(part) > 1]
    return torch.stack(spreads).mean().item() if spreads else 0.0


def reference(training, held_out):
    """What `measure` compares with: from dicts of real images' `features`, `neighbours` and `small`, as it has them."""
    return {
        "features": with_root(*statistics(training["features"])),
        "small": with_root(*statistics(training["small"])),
        "neighbours": training["neighbours"][:NEIGHBOURS],  # of which as many as generated images are used
        "radii": {},  # of these, by their number
        "training": training["small"],  # all that a generator could have copied
        # One in a hundred held-out real images is closer than this to the nearest training image.
        "copied_below": nearest(held_out["small"], training["small"]).quantile(0.01),
    }


def measure(seen, labels, reference):
    """All metrics of images that were generated for `labels` `[N]`: a dict of floats.

    seen: a dict of these images' `features` (Inception's, the classifier's or `small`), `small` (averaged pixels),
    `neighbours` (`features` or `small`, for the metrics that compare all pairs), and, if the network has classes,
    `logits` (the classifier's) and `images` (uint8); all `[N, ...]`. reference: from the function of that name.
    """
    real, fake = reference["neighbours"][: len(labels)], seen["neighbours"][:NEIGHBOURS]
    if len(real) not in reference["radii"]:
        reference["radii"][len(real)] = radii(real, 3, 5)
    values = {
        "frechet_distance": frechet_distance(seen["features"], reference["features"]),
        "pixel_frechet_distance": frechet_distance(seen["small"], reference["small"]),
        **neighbour_metrics(real, fake, reference["radii"][len(real)]),
    }
    if "logits" in seen:
        values["own_label"] = (seen["logits"].argmax(1) == labels).double().mean().item()
        values["within_class_spread"] = within_class_spread(seen["images"], labels)
    copied = nearest(seen["small"][:NEIGHBOURS], reference["training"]) < reference["copied_below"]
    return values | {"near_copies": copied.double().mean().item()}


def measure_with_noise(seen, labels, reference, size, draws=8):
    """`measure`, and under `noise` the standard deviation of each metric: the mean over parts of `size` images.

    The deviation comes from the metrics of random halves of a part. For a mean it is the standard error of the whole
    part (the delete-half jackknife). It covers the choice of images, not that of the training's seed.
    """
    parts = torch.arange(len(labels) // size * size).split(size)
    random = torch.Generator().manual_seed(0)
    halves = [parts[draw % len(parts)][torch.randperm(size, generator=random)[: size // 2]] for draw in range(draws)]

    def of(index):
        index = index.to(labels.device)
        return measure({name: rows[index] for name, rows in seen.items()}, labels[index], reference)

    wholes, halves = ([of(index) for index in indices] for indices in (parts, halves))
    values = {name: sum(whole[name] for whole in wholes) / len(wholes) for name in wholes[0]}
    noise = {name: torch.tensor([half[name] for half in halves]).std().item() / len(parts) ** 0.5 for name in values}
    return {"images": len(parts) * size, **values, "noise": noise}


def verdict(student, teacher, real):
    """In which metrics the student is better than its teacher, worse, or as good: a dict of lists of names.

    Each argument is a row with the metrics and their `noise`. Two values differ if they are more than three standard
    deviations of their difference apart. At two, two of five comparisons of equal models would find a difference.
    """
    result = {"better": [], "worse": [], "as good": []}
    for name in student["noise"]:
        values = [row[name] if BETTER[name] else abs(row[name] - real[name]) for row in (student, teacher)]
        noise = (student["noise"][name] ** 2 + teacher["noise"][name] ** 2) ** 0.5
        how = "better" if (BETTER[name] or min)(values) == values[0] else "worse"
        result["as good" if abs(values[0] - values[1]) <= 3 * noise else how].append(name)
    return result


def best(rows):
    """The index of the row of the least mean rank in the metrics `RANKED`; of equal ones, of Frechet distance."""

    def rank(row):  # how often another row is better
        return sum(BETTER[name](other[name], row[name]) != row[name] for other in rows for name in RANKED)

    return min(range(len(rows)), key=lambda index: (rank(rows[index]), rows[index]["frechet_distance"]))
