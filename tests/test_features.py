import re

import pytest
import torch
from conftest import write_images

from data import Dataset, load_dataset
from support import features, logger
from support.config import UserError
from support.images import to_uint8
from support.metrics import frechet_distance, statistics

CPU = torch.device("cpu")


def shades(each=20, size=8, channels=1, classes=2):
    """Noise around a grey that tells the class."""
    labels = torch.arange(classes).repeat(each)
    noise = torch.randn(len(labels), channels, size, size, generator=torch.Generator().manual_seed(0))
    greys = (labels / classes - 0.5)[:, None, None, None]
    return Dataset(to_uint8(greys + 0.3 * noise), labels, [str(label) for label in range(classes)])


@pytest.fixture
def short(monkeypatch):
    """Judges that train for eight steps, and save what they have after each."""
    monkeypatch.setattr(features, "plan", lambda dataset: (8, 4))
    monkeypatch.setattr(features, "SAVE_SECONDS", -1)


def weights(path):
    return torch.load(path, weights_only=True)["model_state_dict"]


@pytest.mark.slow
def test_classifier_ranks_real_above_blurred_above_noise(tmp_path):
    """Real digits that it has not seen, the same moved half-way to their class mean, noise. And it reads digits."""
    dataset = load_dataset("mnist5k", tmp_path, 16)
    cache = tmp_path / "judge.pt"
    measure, accuracy = features.classifier(dataset, cache, CPU)
    assert accuracy >= 0.98
    again, same_accuracy = features.classifier(dataset, cache, CPU)  # from the cache
    images = dataset.images[:50]
    assert same_accuracy == accuracy and torch.equal(again(images)[0], measure(images)[0])

    train_set, held_out = features.split(dataset)
    assert len(train_set.labels) == 4000 and len(held_out.labels) == 1000
    real = statistics(measure(train_set.images)[0])
    means = torch.stack([train_set.images[train_set.labels == label].float().mean(0) for label in range(10)])
    blurred = ((held_out.images.float() + means[held_out.labels]) / 2).to(torch.uint8)
    noise = to_uint8(torch.randn(1000, 1, 16, 16, generator=torch.Generator().manual_seed(0)))
    judged = [measure(images) for images in (held_out.images, blurred, noise)]
    distances = [frechet_distance(statistics(seen), real) for seen, _ in judged]
    shares = [(logits.argmax(1) == held_out.labels).float().mean() for _, logits in judged]
    assert distances[0] < distances[1] < distances[2] and distances[2] > 10 * distances[0]
    assert shares[0] > 0.95 and shares[2] < 0.3


def test_cached_classifier_of_other_data_is_not_used(tmp_path, short):
    write_images(tmp_path / "a", size=16)
    write_images(tmp_path / "b", size=16, seed=1)
    for name in ("a", "b"):
        features.classifier(load_dataset("folder", tmp_path / name, 16), tmp_path / "judge.pt", CPU)
        features.classifier(load_dataset("folder", tmp_path / name, 16), "/dev/null/judge.pt", CPU)  # nowhere to keep it
        state = torch.load(tmp_path / "judge.pt", weights_only=True)
        if name == "a":
            first = state
    assert state["fingerprint"] != first["fingerprint"]


def test_classifier_trained_otherwise_is_not_used(tmp_path, short, monkeypatch, capsys):
    def trains():
        features.classifier(shades(), tmp_path / "judge.pt", CPU)
        return "training the judge" in capsys.readouterr().out

    assert trains() and not trains()
    monkeypatch.setattr(features, "plan", lambda dataset: (9, 4))
    assert trains() and not trains()
    monkeypatch.setattr(features, "augment", lambda images, stream: images)
    assert trains() and not trains()


@pytest.mark.parametrize("suffix", ["", ".part"])
def test_damaged_or_foreign_file_is_made_again(tmp_path, short, suffix):
    features.classifier(shades(), tmp_path / "judge.pt", CPU)
    good = (tmp_path / "judge.pt").read_bytes()
    expected = weights(tmp_path / "judge.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor")
    middle = len(good) // 2  # among the weights
    damaged = good[:middle] + bytes([good[middle] ^ 64]) + good[middle + 1 :]
    for content in (b"ab", good[:middle], damaged, (tmp_path / "tensor").read_bytes()):
        (tmp_path / "judge.pt").unlink()
        (tmp_path / f"judge.pt{suffix}").write_bytes(content)
        features.classifier(shades(), tmp_path / "judge.pt", CPU)
        torch.testing.assert_close(weights(tmp_path / "judge.pt"), expected, rtol=0, atol=0)


def test_interrupted_training_goes_on_to_the_same_judge(tmp_path, short, monkeypatch):
    steps, lr_factor = [], features.lr_factor

    def interrupt(step, *arguments):
        steps.append(step)
        if step == 5 and steps.count(5) == 1:
            raise KeyboardInterrupt
        return lr_factor(step, *arguments)

    features.classifier(shades(), tmp_path / "whole.pt", CPU)
    monkeypatch.setattr(features, "lr_factor", interrupt)
    torch.randn(7)  # other random numbers than before
    with pytest.raises(KeyboardInterrupt):
        features.classifier(shades(), tmp_path / "judge.pt", CPU)
    assert {path.name for path in tmp_path.iterdir()} == {"whole.pt", "judge.pt.part"}
    features.classifier(shades(), tmp_path / "judge.pt", CPU)
    assert steps == [0, 1, 2, 3, 4, 5, 5, 6, 7]
    assert {path.name for path in tmp_path.iterdir()} == {"whole.pt", "judge.pt"}
    torch.testing.assert_close(weights(tmp_path / "judge.pt"), weights(tmp_path / "whole.pt"), rtol=0, atol=0)


def test_training_does_not_touch_the_random_numbers_of_others(tmp_path, short):
    state = torch.get_rng_state()
    features.classifier(shades(), tmp_path / "judge.pt", CPU)
    assert torch.equal(torch.get_rng_state(), state)


def test_training_tells_how_long_it_takes(tmp_path, short, monkeypatch, capsys):
    monkeypatch.setattr(logger, "REPORT_AFTER", 3)
    features.classifier(shades(), tmp_path / "judge.pt", CPU)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "training the judge, a classifier, on 32 real images, this once"
    assert re.fullmatch(r"training the judge: step 3 of 8, about \d+\.\d minutes left", second)
    features.classifier(shades(), tmp_path / "judge.pt", CPU)  # from the cache
    assert capsys.readouterr().out == ""

    monkeypatch.setattr(logger, "REPORT_SECONDS", -1)
    assert list(logger.progress(range(5, 8), "reading", "step")) == [5, 6, 7]
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == ["6", "7", "8"]


def test_only_one_process_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "rank", lambda: 1)
    features.classifier(shades(), tmp_path / "judge.pt", CPU)
    assert not list(tmp_path.iterdir())


def test_steps_suit_the_data():
    def plan(count, size):
        steps, batch_size = features.plan(Dataset(torch.zeros(count, 1, 1, 1).expand(-1, 3, size, size), torch.zeros(count), []))
        assert 2 <= batch_size <= max(2, count // 4)
        return steps * batch_size / count, steps * batch_size * size * size  # epochs, pixels

    assert plan(4000, 16)[0] == pytest.approx(features.EPOCHS, rel=0.01)
    for count, size in [(40_000, 32), (1_000_000, 32), (1_000_000, 8), (40_000, 64)]:  # no data set takes longer
        assert plan(count, size)[1] == pytest.approx(features.MOST_PIXELS, rel=0.01)
    for size in (48, 64):
        assert plan(96, size)[1] < features.MOST_PIXELS / 20  # half a minute, where CIFAR-10 takes ten
    assert plan(8, 8)[0] * 8 >= 300 * 2


@pytest.mark.parametrize("each,size,channels,classes", [(10, 8, 1, 2), (10, 64, 3, 2), (2, 11, 3, 10), (5, 48, 1, 4)])
def test_judges_of_tiny_data(tmp_path, monkeypatch, each, size, channels, classes):
    plan = features.plan
    monkeypatch.setattr(features, "plan", lambda dataset: (3, plan(dataset)[1]))
    dataset = shades(each, size, channels, classes)
    judge, accuracy = features.classifier(dataset, tmp_path / "judge.pt", CPU)
    seen, logits = judge(dataset.images)
    assert seen.shape == (each * classes, 128) and logits.shape == (each * classes, classes) and 0 <= accuracy <= 1
    assert seen.dtype == torch.float32 and seen.isfinite().all() and logits.isfinite().all()


def test_a_few_images_are_learnt(tmp_path):
    assert features.classifier(shades(each=20), tmp_path / "judge.pt", CPU)[1] == 1.0


def test_coloured_images_are_mirrored_and_digits_are_not():
    """An image that is bright on the left. Coloured, it moves by whole pixels: no pixel gets a value that none had."""
    place = torch.arange(16.0)
    grey = ((place[:, None] - 2 * place) / 32).expand(64, 1, -1, -1)
    for images in (grey, grey.expand(-1, 3, -1, -1), torch.cat([grey, grey, -grey], dim=1)):
        coloured = images.shape[1] == 3 and not torch.equal(images[:, 0], images[:, 2])
        changed = features.augment(images, torch.Generator().manual_seed(0))
        mirrored = (changed[:, 0, :, :8].mean((1, 2)) < changed[:, 0, :, 8:].mean((1, 2))).sum()
        assert 16 < mirrored < 48 if coloured else mirrored == 0
        whole = (changed * 32).round() / 32
        assert ((changed - whole).abs().max() < 1e-4) == coloured
        assert len(whole.unique(dim=0)) > 12  # of the 2 * 3 * 3 ways to mirror it and to move it by one pixel


def test_inception_sees_grey_and_colour(inception_weights):
    measure = features.inception(str(inception_weights), CPU)
    images = torch.randint(0, 200, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen, logits = measure(images)
    assert seen.shape == (6, 2048) and logits.shape == (6, 1008)
    grey = measure(images[:2, :1])[0]  # one channel stands for all three
    torch.testing.assert_close(grey, measure(images[:2, :1].expand(-1, 3, -1, -1))[0])


def test_pixels_are_averaged_until_they_are_few():
    images = torch.arange(2 * 3 * 32 * 32).reshape(2, 3, 32, 32).to(torch.uint8)
    pixels, small = features.pixels(images)
    assert pixels.shape == (2, 3072) and small.shape == (2, 192)
    torch.testing.assert_close(small[1, 5], (images[1, 0, :4, 20:24].float() / 127.5 - 1).mean())
    assert features.pixels(images[:, :1, :16, :16])[1].shape == (2, 256)  # digits are few as they are


def test_failed_download_of_inception_says_what_to_do(monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3 as module

    def offline(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(module, "load_state_dict_from_url", offline)
    with pytest.raises(UserError, match=r"no network.*--inception_weights.*--features classifier"):
        features.inception(None, CPU)
