import io
import zipfile

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_NET, run_script, succeed, tiny_unet
from PIL import Image
from test_config import assert_refused

import checkpoint
from generate import choose_classes, file_names
from sampling import class_noise, heun_sampler, one_step_sampler
from support.config import UserError
from support.images import to_uint8


def generate(runs, folder, *arguments, run=succeed):
    """generate.py on the session's tiny student, a few images of each class."""
    student = runs / "dmd2" / "dmd2_final.pt"
    return run("generate.py", "--checkpoint", student, "--output_dir", folder, "--num_samples", 2, *arguments)


def contents(folder):
    """A dict from name to bytes of the files in a folder, at any depth."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """A checkpoint of an untrained generator with three channels and two classes, `cat` and `dog`."""
    net = tiny_unet(img_channels=3, label_dim=2)
    state = {"feedforward_model_state_dict": net.state_dict(), "ema_state_dict": None, "step": 1, "model_config": net.config}
    path = tmp_path_factory.mktemp("colours") / "x.pt"
    checkpoint.save(path, state | {"config": {}, "class_names": ["cat", "dog"]})
    return path


# ---- what each format holds -------------------------------------------------------------------------------------------------


def test_a_grid_of_each_class(runs, tmp_path):
    """A second run, also of fewer classes, replaces its own grids and leaves the others."""
    file = runs / "dmd2" / "dmd2_final.pt"
    out = succeed("generate.py", "--checkpoint", file, "--output_dir", tmp_path)
    assert "160 images in" in out and "1 network evaluation per image" in out
    assert out.endswith(f"wrote 160 images of 10 classes to {tmp_path}\n")
    names = {f"{digit}_samples.png" for digit in range(10)} | {"overview.png"}
    first = contents(tmp_path)
    assert first.keys() == names
    out = generate(runs, tmp_path, "--classes", 3, "--num_samples", 1)
    assert "1 image in" in out and out.endswith(f"wrote 1 image of 1 class to {tmp_path}\n")
    assert {name for name, data in contents(tmp_path).items() if data != first[name]} == {"3_samples.png", "overview.png"}


def test_images_are_what_the_samplers_give(runs, tmp_path):
    """npz: uint8 [N, H, W, C] and int64 labels; the student in one step, the teacher by Heun, from the noise of the seed."""
    for stage, sampler in (("dmd2", lambda *a: one_step_sampler(*a, 80.0)), ("teacher", lambda *a: heun_sampler(*a, num_steps=3))):
        file = runs / stage / f"{stage}_final.pt"
        arguments = ["--num_samples", 5, "--classes", "7,2", "--steps", 3, "--seed", 4, "--format", "npz", "--batch_size", 3]
        out = succeed("generate.py", "--checkpoint", file, "--output_dir", tmp_path / stage, *arguments)
        assert ("1 network evaluation per" if stage == "dmd2" else "5 network evaluations per") in out
        assert out.endswith(f"wrote {tmp_path / stage / 'samples.npz'}\n")
        arrays = np.load(tmp_path / stage / "samples.npz")
        assert arrays["images"].dtype == np.uint8 and arrays["images"].shape == (10, 8, 8, 1)
        assert arrays["labels"].dtype == np.int64 and arrays["labels"].tolist() == [7] * 5 + [2] * 5
        with torch.no_grad():
            images = sampler(checkpoint.load_network(file), *class_noise([7, 2], 5, (1, 8, 8), seed=4))
        expected = (images * 127.5 + 127.5).clamp(0, 255).permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(arrays["images"], expected, atol=0.51)


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_as_guided_diffusions_evaluator_reads_it(runs, colours, tmp_path, channels):
    """The member arr_0.npy streams as uint8 [N, H, W, 3] in C order from behind a header of version 1.0; arr_1 has the labels."""
    file = colours if channels == 3 else runs / "dmd2" / "dmd2_final.pt"
    generate(runs, tmp_path, "--checkpoint", file, "--format", "npz")
    arrays = np.load(tmp_path / "samples.npz")
    assert arrays["images"].shape[1:] == (8, 8, channels)
    with zipfile.ZipFile(tmp_path / "samples.npz") as archive, archive.open("arr_0.npy") as member:
        assert np.lib.format.read_magic(member) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        assert shape == (len(arrays["images"]), 8, 8, 3) and not fortran and dtype == np.uint8
        pixels = np.frombuffer(member.read(), np.uint8).reshape(shape)
    assert (pixels == arrays["images"]).all()  # grey: one channel is compared with all three
    assert (arrays["arr_1"] == arrays["labels"]).all()


def test_png_can_be_trained_on(runs, tmp_path):
    generate(runs, tmp_path / "png", "--format", "png")
    assert len(list((tmp_path / "png").glob("*/*.png"))) == 20
    data = ["--dataset", "folder", "--data_dir", tmp_path / "png", "--output_dir", tmp_path / "run"]
    succeed("train_teacher.py", *TINY, *TINY_NET, *data)


def test_flat_as_fid_tools_read_it(runs, tmp_path):
    """RGB, all in the folder itself, and by torch-fidelity's own search; the pixels of --format png."""
    from torch_fidelity.utils import prepare_input_from_descriptor

    for format in ("png", "flat"):
        generate(runs, tmp_path / format, "--format", format)
    flat, png = contents(tmp_path / "flat"), contents(tmp_path / "png")
    assert len(flat) == 20 and {name.replace("_", "/") for name in flat} == png.keys()
    for name, data in flat.items():
        image, grey = (Image.open(io.BytesIO(data)) for data in (data, png[name.replace("_", "/")]))
        assert image.mode == "RGB" and (np.asarray(image) == np.asarray(grey)[..., None]).all()
    options = {"samples_find_deep": False, "samples_find_ext": "png,jpg,jpeg", "samples_resize_and_crop": 0, "verbose": False}
    read = prepare_input_from_descriptor({"input": str(tmp_path / "flat")}, **options)
    assert len(read) == 20 and read[0].shape == (3, 8, 8) and read[0].dtype == torch.uint8


def test_colours_stay_what_they_are(runs, colours, tmp_path):
    for format, name in (("png", "dog/000001.png"), ("flat", "dog_000001.png"), ("npz", "samples.npz")):
        generate(runs, tmp_path, "--checkpoint", colours, "--format", format)
        assert (tmp_path / name).exists()
    images = [np.asarray(Image.open(tmp_path / name)) for name in ("dog/000001.png", "dog_000001.png")]
    assert (images[0] == images[1]).all() and (images[0] == np.load(tmp_path / "samples.npz")["images"][3]).all()
    assert (images[0] != images[0][..., :1]).any()


# ---- without classes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["teacher", "dmd2"])
@pytest.mark.parametrize("format", ["grid", "png", "flat", "npz"])
def test_without_classes_there_is_one_set_of_images(unconditional, tmp_path, stage, format):
    """Five images of the noise of class 0, in one file or by their numbers."""
    file = unconditional / stage / f"{stage}_final.pt"
    arguments = ["--checkpoint", file, "--format", format, "--num_samples", 5, "--steps", 2, "--output_dir", tmp_path]
    out = succeed("generate.py", *arguments)
    assert "5 images in" in out and "class" not in out.replace(str(tmp_path), "")
    names = {"grid": ["samples.png"], "npz": ["samples.npz"]}.get(format)
    names = names or [{"png": "samples/{:06d}.png", "flat": "samples_{:06d}.png"}[format].format(i) for i in range(5)]
    assert contents(tmp_path).keys() == set(names)
    noise, labels = class_noise([0], 5, (3, 8, 8), seed=0)
    assert torch.equal(labels, torch.zeros(5, dtype=torch.long))
    with torch.no_grad():
        expected = to_uint8(checkpoint.load_sampler(file, steps=2)(noise, None)).permute(0, 2, 3, 1)
    if format == "npz":
        arrays = np.load(tmp_path / "samples.npz")
        images = arrays["images"]
        assert (arrays["labels"] == 0).all()
    elif format == "grid":
        picture = np.asarray(Image.open(tmp_path / "samples.png"))[::8, ::8]  # each pixel is a square of 8
        images = [picture[1 + 10 * (i // 2) :, 1 + 10 * (i % 2) :][:8, :8] for i in range(5)]
    else:
        images = [np.asarray(Image.open(tmp_path / name)) for name in names]
    for image, other in zip(images, expected, strict=True):
        assert abs(image.astype(int) - other.numpy()).max() <= 1


def test_without_classes_none_can_be_asked_for(unconditional, tmp_path):
    arguments = ["--checkpoint", unconditional / "dmd2" / "dmd2_final.pt", "--output_dir", tmp_path / "out", "--classes", "0"]
    assert_refused(run_script("generate.py", *arguments), "--classes 0: the network has no classes; leave it out")
    assert not (tmp_path / "out").exists()


def test_pngs_without_classes_can_be_trained_on(unconditional, tmp_path):
    generate(unconditional, tmp_path / "png", "--format", "png", "--num_samples", 20)
    data = ["--dataset", "folder", "--data_dir", tmp_path / "png" / "samples", "--output_dir", tmp_path / "run"]
    assert "20 images, no classes" in succeed("train_teacher.py", *TINY, *TINY_NET, *data)


# ---- folders that hold images already ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("format, name", [("png", "{}/000000.png"), ("flat", "{}_000000.png"), ("npz", "samples.npz")])
def test_images_of_another_run_are_refused_or_deleted(runs, tmp_path, format, name):
    """It is refused, and nothing changes. With --overwrite, the other run's files are deleted, and files of no run stay."""
    folder, fresh = tmp_path / "a", tmp_path / "b"
    generate(runs, folder, "--format", format, "--classes", "4,5,7")
    mine = {"notes.txt": b"mine", "7/000000.txt": b"mine"}
    for file, text in mine.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(text)
    before = contents(folder)
    arguments = ["--format", format, "--classes", "5,6", "--num_samples", 1]
    done = generate(runs, folder, *arguments, run=run_script)
    assert_refused(done, f"--output_dir {folder}: holds another run's {name.format(4)}; --overwrite")
    assert contents(folder) == before

    generate(runs, folder, *arguments, "--overwrite")
    generate(runs, fresh, *arguments)
    assert contents(folder) == contents(fresh) | mine
    assert not (folder / "4").exists()  # an empty folder would be a class without images to --dataset folder


@pytest.mark.parametrize(
    "format, name",
    [
        ("png", "cat/0.png"),
        ("png", "x/y/000001.png"),
        ("png", "cat/000001.png"),
        ("flat", "overview.png"),
        ("flat", "frame_000001.png"),
    ],
)
def test_images_of_nobodys_are_neither_deleted_nor_joined(runs, tmp_path, format, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(tmp_path / name)
    for flags in ([], ["--overwrite"]):
        done = generate(runs, tmp_path, "--format", format, *flags, run=run_script)
        assert_refused(done, f"holds {name}, which --overwrite does not delete")
    assert contents(tmp_path).keys() == {name}


def test_formats_share_a_folder_where_no_reader_mixes_them_up(runs, tmp_path):
    """Grids, class folders and npz go together; a grid in a flat folder would be read as a sample, and is refused."""
    for format, folder in (("grid", "a"), ("npz", "a/teacher"), ("npz", "a"), ("png", "a")):
        generate(runs, tmp_path / folder, "--format", format)
    generate(runs, tmp_path / "b", "--format", "flat")
    before = contents(tmp_path / "b")
    for flags in ([], ["--overwrite"]):
        assert_refused(generate(runs, tmp_path / "b", *flags, run=run_script), "holds images of --format flat")
    assert contents(tmp_path / "b") == before


# ---- names of classes -------------------------------------------------------------------------------------------------------


def test_classes_whose_names_make_one_file_name_stay_apart(runs, tmp_path):
    state = torch.load(runs / "dmd2" / "dmd2_final.pt", weights_only=True)
    state["class_names"] = ["a/b", "A b", *state["class_names"][2:]]
    checkpoint.save(tmp_path / "x.pt", state)
    generate(runs, tmp_path / "out", "--checkpoint", tmp_path / "x.pt", "--classes", "A b,a/b,A b,5")
    assert contents(tmp_path / "out").keys() == {"a_b_0_samples.png", "a_b_1_samples.png", "5_samples.png", "overview.png"}
    assert file_names(["a", "A", "a_0"]) == ["a_0", "a_1", "a_0_2"]


def test_unknown_class_is_refused(runs, tmp_path):
    assert_refused(generate(runs, tmp_path / "x", "--classes", "1,cat", run=run_script), "no class 'cat'; there are 0, 1, 2")
    assert not (tmp_path / "x").exists()


def test_a_class_with_a_comma_in_its_name_can_be_asked_for():
    assert choose_classes("c,d", ["a", "b", "c,d"]) == [2]
    assert choose_classes("b, a,b", ["a", "b", "c,d"]) == [1, 0]
    assert choose_classes('b, "c,d",a', ["a", "b", "c,d"]) == [1, 2, 0]
    with pytest.raises(UserError, match=r'there are a, b, "c,d"'):
        choose_classes("a,c", ["a", "b", "c,d"])
