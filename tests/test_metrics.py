"""The metrics against closed forms, and against failures planted in real digits: the table of docs/evaluation.md."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from data import load_dataset
from evaluation import features, metrics

CPU = torch.device("cpu")


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frechet(a, b):
    return metrics.frechet_distance(a, metrics.with_root(*metrics.statistics(b)))


def neighbours(real, fake, ks):
    return metrics.neighbour_metrics(real, fake, metrics.radii(real, *ks), ks)


# ---- closed forms ---------------------------------------------------------------------------------------------------


def test_frechet_distance_of_gaussians():
    """Of diagonal covariances: |m1 - m2|^2 + sum (s1 - s2)^2; of rotated ones the same."""
    mean, s1, s2 = torch.tensor([[1.0, -2.0, 0.5], [1.0, 2.0, 0.1], [3.0, 2.0, 0.0]]).double()
    white = normal(500, 3) - normal(500, 3).mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(white.T.cov())).T  # covariance 1, mean 0
    rotation = torch.linalg.qr(normal(3, 3)).Q
    ours, theirs = (white * s1) @ rotation.T + mean, (white * s2) @ rotation.T
    expected = mean.square().sum() + (s1 - s2).square().sum()
    assert frechet(ours, theirs) == pytest.approx(expected.item(), rel=1e-6)
    assert frechet(theirs, ours) == pytest.approx(expected.item(), rel=1e-6)
    assert frechet(ours, ours) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_is_torch_fidelitys():
    a, b = normal(300, 20) * torch.linspace(0.1, 3, 20), normal(200, 20, 1) + 0.3
    for ours in (a, a[:5]):  # the second has a covariance of rank 4
        published = fid_statistics_to_metric(*map(fid_features_to_statistics, (ours, b)), verbose=False)
        assert frechet(ours.float(), b) == pytest.approx(published[KEY_METRIC_FID], rel=1e-6)


def test_distances_of_close_images_far_from_zero():
    a = 1e4 + torch.arange(30).float().reshape(30, 1).expand(30, 100) / 64
    found = torch.cat(list(metrics.distances(a, a)))
    expected = 10 / 64 * (torch.arange(30)[:, None] - torch.arange(30)).abs()
    torch.testing.assert_close(found, expected.double(), rtol=1e-2, atol=1e-3)


def test_precision_recall_density_coverage_on_a_line():
    """Real images at 0, 1, 2, 3, 10; k = 1. Neighbours lie at 1, 1, 1, 1 and 7. Fakes at 0.5, 1.5, 4.5, 30."""
    real = torch.tensor([0.0, 1, 2, 3, 10])[:, None]
    fake = torch.tensor([0.5, 1.5, 4.5, 30])[:, None]
    # inside real balls: 0.5 of 0 and 1; 1.5 of 1 and 2; 4.5 of 10 alone; 30 of none
    # fake balls have radii 1, 1, 3, 25.5: reaching 0, 1 | 1, 2 | 2, 3 | 10
    expected = {"precision": 0.75, "recall": 1.0, "density": 5 / 4, "coverage": 4 / 5}  # 3 has nothing within 1
    assert neighbours(real, fake, (1, 1)) == pytest.approx(expected)
    # Each k has its own metrics: the second real neighbours lie at 2, 1, 1, 2 and 8, and 4.5 is in the ball of 3 too.
    assert neighbours(real, fake, (1, 2)) == pytest.approx(expected | {"density": 8 / 8, "coverage": 1.0})
    assert neighbours(real, fake, (2, 1))["density"] == 5 / 4
    # A ball contains its surface, and a lone image is its own neighbour.
    assert neighbours(real[2:], real[:2], (1, 1))["recall"] == 1 / 3
    alone = neighbours(real[:2], torch.tensor([[2.0]]), (1, 1))
    assert alone == {"precision": 1, "recall": 0, "density": 1, "coverage": 0.5}


def test_precision_and_recall_are_torch_fidelitys(monkeypatch):
    """And no metric depends on the blocks in which distances are computed."""
    real, fake = normal(150, 4).float(), normal(130, 4, 1).float() * 0.8
    published = prc_features_to_metric(fake, real, verbose=False, prc_neighborhood=3)
    ours = neighbours(real, fake, (3, 5))
    assert ours["precision"] == pytest.approx(published[KEY_METRIC_PRECISION], abs=0.01)
    assert ours["recall"] == pytest.approx(published[KEY_METRIC_RECALL], abs=0.01)
    monkeypatch.setattr(metrics, "BLOCK", 7)
    assert neighbours(real, fake, (3, 5)) == ours


def test_within_class_spread_is_the_variance_around_each_classs_mean():
    """Of uint8 pixels in the units of [-1, 1]."""
    images = torch.tensor([[0, 0], [2, 0], [255, 5], [255, 9], [7, 7]]).to(torch.uint8).reshape(5, 1, 1, 2)
    labels = torch.tensor([0, 0, 1, 1, 2])  # the third class has one image
    assert metrics.within_class_spread(images, labels) == pytest.approx((2 + 8) / 2 / 127.5**2)


def row(noise=0.01, **changes):
    values = {name: 0.5 for name in metrics.BETTER} | changes
    return {**values, "noise": dict.fromkeys(metrics.BETTER, noise)}


def test_a_verdict_tells_differences_from_noise():
    student = row(frechet_distance=0.3, recall=0.4, coverage=0.52, density=0.8, within_class_spread=0.45)
    teacher = row(frechet_distance=0.5, recall=0.5, coverage=0.5, density=0.6, within_class_spread=0.7)
    told = metrics.verdict(student, teacher, row())
    assert told["better"] == ["frechet_distance", "within_class_spread"]  # the spread is nearer to real images'
    assert told["worse"] == ["recall", "density"]
    assert "coverage" in told["as good"] and sum(map(len, told.values())) == len(metrics.BETTER)


def test_the_best_checkpoint_is_not_the_one_that_draws_prototypes():
    """The least Frechet distance of all, bought with lost diversity, does not make it best."""
    early = row(frechet_distance=5.0, pixel_frechet_distance=2.0, recall=0.8, coverage=0.8)
    good = row(frechet_distance=3.0, pixel_frechet_distance=1.2, recall=0.9, coverage=0.9)
    prototypes = row(frechet_distance=2.5, pixel_frechet_distance=2.7, recall=0.4, coverage=0.85)
    assert metrics.best([early, good, prototypes]) == 1
    assert metrics.best([good, good | {"frechet_distance": 2.9}]) == 1


# ---- noise ----------------------------------------------------------------------------------------------------------


def seen_of(points, logits=None):
    images = (128 + 30 * points).clamp(0, 255).to(torch.uint8)
    logits = torch.zeros(len(points), 2) if logits is None else logits
    return {"features": points, "neighbours": points, "small": points, "images": images, "logits": logits}


def reference_of(points):
    return metrics.reference(seen_of(points), seen_of(points + 0.02))


def measured(reference, points, size, logits=None):
    labels = torch.zeros(len(points), dtype=torch.long)
    return metrics.measure_with_noise(seen_of(points, logits), labels, reference, size)


def test_noise_is_the_spread_of_the_figure_over_draws():
    """Against the real spread over 12 draws of 400 points: within a factor of two for each metric."""
    reference, draws = reference_of(normal(2000, 6)), [normal(400, 6, seed) * 0.9 for seed in range(1, 13)]
    rows = [measured(reference, d, 400, F.one_hot((d[:, 0] > 0).long(), 2).double()) for d in draws]
    for name in metrics.BETTER:
        spread = np.std([row[name] for row in rows], ddof=1)
        noise = np.mean([row["noise"][name] for row in rows])
        assert (spread == 0 and noise == 0) or 0.5 < noise / spread < 2, (name, spread, noise)


def test_more_images_make_less_noise_and_leave_the_metric(monkeypatch):
    """1,600 images in parts of 400: the metrics are of 400 images each, so that they compare; their noise is half.

    The root of the reference's covariances, of features and of averaged pixels, is computed once.
    """
    calls, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(matrix) or eigh(matrix))
    reference = reference_of(normal(2000, 6))
    few, many = (measured(reference, normal(n, 6, 1), 400) for n in (400, 1700))
    assert few["images"] == 400 and many["images"] == 1600  # the last 100 make no part
    for name in ("frechet_distance", "recall", "within_class_spread"):
        assert abs(few[name] - many[name]) < 4 * few["noise"][name]
        assert 0.25 < many["noise"][name] / few["noise"][name] < 0.9
    assert len(calls) == 2


# ---- planted failures -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """(a function that measures images and labels, the training set, the held-out digits)"""
    dataset = load_dataset("mnist5k", "unused", 16)
    classifier, accuracy = features.classifier(dataset, tmp_path_factory.mktemp("classifier") / "classifier.pt", CPU)
    assert accuracy >= 0.98

    def see(images):
        small, (classified, logits) = features.averaged_pixels(images), classifier(images)
        return {"features": classified, "neighbours": small, "logits": logits, "images": images, "small": small}

    training, held_out = features.split(dataset)
    reference = metrics.reference(see(training.images), see(held_out.images))

    def measure(images, labels):
        return metrics.measure_with_noise(see(images), labels, reference, len(labels))

    return measure, training, held_out


def ten_images(images, labels, training):
    index = torch.arange(len(labels))
    for label in range(10):
        members = (labels == label).nonzero().flatten()
        index[members] = members[:10].repeat(len(members))[: len(members)]
    return images[index], labels


def towards_the_mean(images, labels, training):
    means = torch.stack([images[labels == label].float().mean(0) for label in range(10)])
    return (0.8 * images + 0.2 * means[labels]).round().to(torch.uint8), labels


def blurred(images, labels, training):
    return F.avg_pool2d(F.pad(images.float(), (1, 1, 1, 1)), 3, 1).round().to(torch.uint8), labels


def swapped_labels(images, labels, training):
    return images, torch.where(torch.arange(len(labels)) % 5 == 0, (labels + 1) % 10, labels)


def one_class_missing(images, labels, training):
    """Its images are replaced by others of the other classes."""
    index, missing = torch.arange(len(labels)), labels == 3
    index[missing] = index[~missing][: missing.sum()]
    return images[index], labels[index]


def copies(images, labels, training):
    return training.images[-len(labels) :], training.labels[-len(labels) :]


FAILURES = {  # what is done -> the metrics that must see it; all others must not
    ten_images: "recall coverage frechet_distance pixel_frechet_distance within_class_spread",
    towards_the_mean: "recall density pixel_frechet_distance within_class_spread",
    blurred: "recall density coverage frechet_distance pixel_frechet_distance within_class_spread own_label",
    swapped_labels: "own_label within_class_spread",
    one_class_missing: "coverage frechet_distance pixel_frechet_distance",
    copies: "near_copies",
}
FAINTLY = {ten_images: {"density"}, one_class_missing: {"recall"}}  # seen, but not clearly


@pytest.mark.slow
@pytest.mark.parametrize("plant", FAILURES)
def test_planted_failures_are_seen(digits, plant):
    """By the metrics that docs/evaluation.md names, by more than four times the noise; the others find nothing."""
    measure, training, held_out = digits
    truth = held_out.images, held_out.labels
    real, planted = measure(*truth), measure(*plant(*truth, training))
    for name in metrics.BETTER.keys() - FAINTLY.get(plant, set()):
        gap = planted[name] - real[name]
        gap = {min: gap, max: -gap, None: abs(gap)}[metrics.BETTER[name]]
        worse = gap / max((planted["noise"][name] ** 2 + real["noise"][name] ** 2) ** 0.5, 1e-9)
        assert worse > 4 if name in FAILURES[plant].split() else worse < 3, (name, worse)


@pytest.mark.slow
def test_two_halves_of_the_real_digits_are_equal(digits):
    measure, _, held_out = digits
    halves = [measure(held_out.images[half], held_out.labels[half]) for half in torch.arange(1000).chunk(2)]
    assert metrics.verdict(*halves, halves[1]) == {"better": [], "worse": [], "as good": list(metrics.BETTER)}
