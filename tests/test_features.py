import re

import pytest
import torch
from torch_fidelity import feature_extractor_inceptionv3 as fidelity

from data import Dataset
from evaluation import features
from support.images import to_uint8
from support.script import UserError

CPU = torch.device("cpu")


def shades(each=20, size=8, channels=1, classes=2):
    """Noise around a grey that tells the class."""
    labels = torch.arange(classes).repeat(each)
    noise = torch.randn(len(labels), channels, size, size, generator=torch.Generator().manual_seed(0))
    greys = (labels / classes - 0.5)[:, None, None, None]
    return Dataset(to_uint8(greys + 0.3 * noise), labels, [str(label) for label in range(classes)])


def test_a_classifier_is_trained_once_and_anew_where_it_does_not_fit(tmp_path, monkeypatch, capsys):
    """For other data, another version, a damaged or foreign file, and where it cannot be kept."""
    monkeypatch.setattr(features, "plan", lambda dataset: (8, 4))  # eight steps
    path = tmp_path / "classifier.pt"

    def trains(dataset, cache=path):
        features.classifier(dataset, cache, CPU)
        return "training the classifier on 32 real images, this once" in capsys.readouterr().out

    ours, others = shades(), shades()._replace(labels=shades().labels.flip(0))
    random_state = torch.get_rng_state()  # training draws from generators of its own
    assert trains(ours) and not trains(ours) and trains(others) and not trains(others)
    assert torch.equal(torch.get_rng_state(), random_state)
    monkeypatch.setattr(features, "VERSION", features.VERSION + 1)
    assert trains(others) and trains(ours) and trains(ours, "/dev/null/classifier.pt")

    good, expected = path.read_bytes(), torch.load(path)["model_state_dict"]
    torch.save(torch.zeros(3), tmp_path / "tensor")
    middle = len(good) // 2  # among the weights
    damaged = good[:middle] + bytes([good[middle] ^ 64]) + good[middle + 1 :]
    for content in (b"ab", good[:middle], damaged, (tmp_path / "tensor").read_bytes()):
        path.write_bytes(content)
        assert trains(ours)
        torch.testing.assert_close(torch.load(path)["model_state_dict"], expected, rtol=0, atol=0)


def test_steps_suit_the_data():
    def plan(count, size):
        images = torch.zeros(count, 1, 1, 1).expand(-1, 3, size, size)
        steps, batch_size = features.plan(Dataset(images, torch.zeros(count), []))
        assert 2 <= batch_size <= max(2, count // 4)
        return steps * batch_size / count, steps * batch_size * size * size  # epochs, pixels

    assert plan(4000, 16)[0] == pytest.approx(features.EPOCHS, rel=0.01)
    for count, size in [(40_000, 32), (1_000_000, 32), (1_000_000, 8), (40_000, 64)]:  # no data set takes longer
        assert plan(count, size)[1] == pytest.approx(features.MOST_PIXELS, rel=0.01)
    assert plan(96, 64)[1] < features.MOST_PIXELS / 20  # half a minute, where CIFAR-10 takes ten
    assert plan(8, 8)[0] * 8 >= 300 * 2


@pytest.mark.parametrize("each,size,channels,classes", [(10, 8, 1, 2), (10, 64, 3, 2), (2, 11, 3, 10), (5, 48, 1, 4)])
def test_classifiers_of_tiny_data(tmp_path, monkeypatch, each, size, channels, classes):
    plan = features.plan
    monkeypatch.setattr(features, "plan", lambda dataset: (3, plan(dataset)[1]))
    dataset = shades(each, size, channels, classes)
    see, accuracy = features.classifier(dataset, tmp_path / "classifier.pt", CPU)
    seen, logits = see(dataset.images)
    assert seen.shape == (each * classes, 128) and logits.shape == (each * classes, classes) and 0 <= accuracy <= 1
    assert seen.dtype == torch.float32 and seen.isfinite().all() and logits.isfinite().all()


def test_a_few_images_are_learnt(tmp_path):
    assert features.classifier(shades(each=20), tmp_path / "classifier.pt", CPU)[1] == 1.0


def test_coloured_images_are_mirrored_and_digits_are_not(monkeypatch, tmp_path):
    """An image that is bright on the left. Coloured, it moves by whole pixels: no pixel gets a value that none had."""
    place = torch.arange(16.0)
    grey = ((place[:, None] - 2 * place) / 32).expand(64, 1, -1, -1)
    for coloured in (False, True):
        changed = features.augment(grey, torch.Generator().manual_seed(0), coloured)
        mirrored = (changed[:, 0, :, :8].mean((1, 2)) < changed[:, 0, :, 8:].mean((1, 2))).sum()
        assert 16 < mirrored < 48 if coloured else mirrored == 0
        whole = (changed * 32).round() / 32
        assert ((changed - whole).abs().max() < 1e-4) == coloured
        assert len(whole.unique(dim=0)) > 12  # of the 2 * 3 * 3 ways to mirror it and to move it by one pixel

    told = set()
    monkeypatch.setattr(features, "plan", lambda dataset: (2, 4))
    monkeypatch.setattr(features, "augment", lambda images, stream, coloured: told.add(coloured) or images)
    for dataset, coloured in [(shades(), False), (shades(channels=3), True)]:
        for images in (dataset.images, dataset.images[:, :1].expand(-1, 3, -1, -1)):  # grey in three channels, too
            told.clear()
            features.classifier(dataset._replace(images=images), tmp_path / "classifier.pt", CPU)
            assert told == {coloured and images is dataset.images}


def test_inception_sees_grey_and_colour(inception_weights):
    see = features.inception(str(inception_weights), CPU)
    images = torch.randint(0, 200, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert see(images).shape == (6, 2048) and see(images).dtype == torch.float32
    grey = see(images[:2, :1])  # one channel stands for all three
    torch.testing.assert_close(grey, see(images[:2, :1].expand(-1, 3, -1, -1)))


def test_pixels_are_averaged_until_they_are_few():
    images = torch.arange(600 * 3 * 32 * 32).reshape(600, 3, 32, 32).to(torch.uint8)  # several batches
    small = features.averaged_pixels(images)
    assert small.shape == (600, 192)
    torch.testing.assert_close(small[599, 5], (images[599, 0, :4, 20:24].float() / 127.5 - 1).mean())
    assert features.averaged_pixels(images[:2, :1, :16, :16]).shape == (2, 256)  # digits are few as they are


def test_inception_weights_that_a_gpu_saved_load_on_a_cpu(inception_weights, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:7")
        torch.save(torch.load(inception_weights), tmp_path / "weights.pth")
    see = features.inception(str(tmp_path / "weights.pth"), CPU)
    assert see(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).shape == (1, 2048)


@pytest.mark.parametrize("weights, told", [(None, "(download)"), ("x.pth", "x.pth")])
def test_inception_that_cannot_be_loaded_says_what_to_do(monkeypatch, weights, told):
    def fail(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(fidelity, "load_state_dict_from_url", fail)
    monkeypatch.setattr(torch, "load", fail)
    message = f"--inception_weights {told}: no network; name torch-fidelity's weights-inception-"
    with pytest.raises(UserError, match=re.escape(message)):
        features.inception(weights, CPU)
