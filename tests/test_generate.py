import numpy as np
import pytest
import torch
from conftest import flags, refuses, tiny_unet
from PIL import Image

import checkpoint
import generate
from data import load_dataset
from generate import load_sampler
from sampling import class_noise, euler_sampler, guided, heun_sampler, one_step_sampler
from support.images import to_uint8
from support.script import UserError


def generated(file, folder, *arguments):
    """generate.py in this process, two images of each class from the checkpoint `file`."""
    generate.main(flags("--num_samples", 2, "--device", "cpu", *arguments, checkpoint=file, output_dir=folder))


def contents(folder):
    """A dict from name to bytes of the files in a folder, at any depth."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def untrained(path, class_names, **changes):
    """A checkpoint of an untrained generator with these classes."""
    net = tiny_unet(label_dim=len(class_names), **changes)
    state = {"feedforward_model_state_dict": net.state_dict(), "model_config": net.config}
    checkpoint.save(path, state | {"step": 1, "config": {}, "class_names": class_names, "student_sigmas": [80.0]})
    return path


@pytest.fixture(scope="module")
def student(runs):
    return runs / "dmd2" / "dmd2_final.pt"


# ---- what each format holds -----------------------------------------------------------------------------------------


def test_a_grid_of_each_class(student, tmp_path, capsys):
    """A second run, also of fewer classes, replaces its own grids and leaves the others."""
    generated(student, tmp_path)
    out = capsys.readouterr().out
    assert "20 images in " in out and out.endswith(f"; wrote {tmp_path}\n")
    first = contents(tmp_path)
    assert first.keys() == {f"{digit}_samples.png" for digit in range(10)} | {"overview.png"}
    generated(student, tmp_path, "--classes", 3, "--num_samples", 1)
    assert "1 image in " in capsys.readouterr().out
    changed = {name for name, data in contents(tmp_path).items() if data != first[name]}
    assert changed == {"3_samples.png", "overview.png"}


@pytest.mark.parametrize(
    "stage, sampler, evaluations", [("teacher", "heun", 5), ("teacher", "euler", 3), ("dmd2", "heun", 1)]
)
def test_images_are_what_the_samplers_give(runs, tmp_path, capsys, stage, sampler, evaluations):
    """npz: uint8 [N, H, W, C] and int64 labels; the student in one step, the teacher in three, of the seed's noise."""
    file = runs / stage / f"{stage}_final.pt"
    arguments = ["--num_samples", 5, "--classes", 7, 2, "--steps", 3, "--seed", 4, "--batch_size", 3]
    generated(file, tmp_path, *arguments, "--format", "npz", "--sampler", sampler)
    assert f"network evaluations per image: {evaluations};" in capsys.readouterr().out
    arrays = np.load(tmp_path / "samples.npz")
    assert arrays["images"].dtype == np.uint8 and arrays["images"].shape == (10, 8, 8, 1)
    assert arrays["labels"].dtype == np.int64 and arrays["labels"].tolist() == [7] * 5 + [2] * 5
    net, noise = checkpoint.load_network(file), class_noise([7, 2], 5, (1, 8, 8), seed=4)
    with torch.no_grad():
        of_teacher = {"heun": heun_sampler, "euler": euler_sampler}[sampler]
        images = one_step_sampler(net, *noise, 80.0) if stage == "dmd2" else of_teacher(net, *noise, num_steps=3)
    expected = (images * 127.5 + 127.5).clamp(0, 255).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(arrays["images"], expected, atol=0.51)
    # for guided-diffusion's evaluator
    assert (arrays["arr_0"] == arrays["images"].repeat(3, axis=3)).all() and arrays["arr_0"].flags.c_contiguous
    assert (arrays["arr_1"] == arrays["labels"]).all()


def test_a_teacher_guided_by_an_earlier_checkpoint(runs, tmp_path, capsys):
    file, early = runs / "teacher" / "teacher_final.pt", runs / "teacher" / "teacher_checkpoint_step_2.pt"
    guidance = ["--guide_checkpoint", early, "--guidance_scale", 3, "--steps", 3, "--num_samples", 2]
    generated(file, tmp_path, *guidance, "--format", "npz")
    assert "network evaluations per image: 10;" in capsys.readouterr().out
    both = guided(checkpoint.load_network(file), checkpoint.load_network(early), 3.0)
    images = heun_sampler(both, *class_noise(range(10), 2, (1, 8, 8), seed=0), num_steps=3).permute(0, 2, 3, 1)
    expected = (images * 127.5 + 127.5).clamp(0, 255).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "samples.npz")["images"], expected, atol=0.51)

    student, options = runs / "dmd2" / "dmd2_final.pt", dict(output_dir=tmp_path / "out", device="cpu")
    refuses("guides a teacher, and", "generate.py", checkpoint=student, guide_checkpoint=early, **options)
    refuses("--guidance_scale needs", "generate.py", checkpoint=file, guidance_scale=2, **options)
    refuses("a generator; give a teacher", "generate.py", checkpoint=file, guide_checkpoint=student, **options)


@pytest.mark.parametrize("channels", [1, 3])
def test_all_formats_hold_the_same_pixels(tmp_path, channels):
    """flat is RGB and lies in the folder itself, where torch-fidelity's own search finds it."""
    from torch_fidelity.utils import prepare_input_from_descriptor

    file = untrained(tmp_path / "x.pt", ["cat", "dog"], img_channels=channels)
    for format in ("png", "flat", "npz", "grid"):
        generated(file, tmp_path / format, "--format", format)
    arrays = np.load(tmp_path / "npz" / "samples.npz")["images"]
    assert channels == 1 or (arrays != arrays[..., :1]).any()
    grids = [np.asarray(Image.open(tmp_path / "grid" / f"{name}_samples.png"))[::8, ::8] for name in ("cat", "dog")]
    for index, name in enumerate(["cat/000000", "cat/000001", "dog/000000", "dog/000001"]):
        png, flat = (Image.open(tmp_path / path) for path in (f"png/{name}.png", f"flat/{name.replace('/', '_')}.png"))
        assert png.mode == ("RGB" if channels == 3 else "L") and flat.mode == "RGB"
        cell = grids[index // 2][2 + 10 * (index % 2) :][:8, 2:10]  # each pixel is a square of 8
        assert (np.asarray(png) == arrays[index].squeeze()).all() and (cell == arrays[index]).all()
        assert (np.asarray(flat) == arrays[index]).all()
    assert len(contents(tmp_path / "png")) == len(contents(tmp_path / "flat")) == 4
    options = {"samples_find_deep": False, "samples_find_ext": "png,jpg", "samples_resize_and_crop": 0}
    read = prepare_input_from_descriptor({"input": str(tmp_path / "flat")}, **options, verbose=False)
    assert len(read) == 4 and read[0].shape == (3, 8, 8) and read[0].dtype == torch.uint8


@pytest.mark.parametrize("stage", ["teacher", "dmd2"])
def test_without_classes_there_is_one_set_of_images(unconditional, tmp_path, stage):
    """Five images of the noise of class 0, in one file or by their numbers."""
    file = unconditional / stage / f"{stage}_final.pt"
    names = {"grid": ["samples.png"], "npz": ["samples.npz"]}
    names |= {"png": [f"samples/00000{n}.png" for n in range(5)], "flat": [f"samples_00000{n}.png" for n in range(5)]}
    for format in names:
        generated(file, tmp_path / format, "--format", format, "--num_samples", 5, "--steps", 2)
        assert contents(tmp_path / format).keys() == set(names[format])
    noise, _ = class_noise([0], 5, (3, 8, 8), seed=0)
    with torch.no_grad():
        expected = to_uint8(load_sampler(file, steps=2)(noise, None)).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "npz" / "samples.npz")["images"], expected, atol=1)


def test_png_can_be_trained_on(runs, unconditional, tmp_path):
    for name, folder, classes in ((runs, "a", 10), (unconditional, "b/samples", 0)):
        generated(name / "dmd2" / "dmd2_final.pt", tmp_path / folder.split("/")[0], "--format", "png")
        dataset = load_dataset("folder", tmp_path / folder, 8)
        assert len(dataset.images) == 2 * max(1, classes) and len(dataset.class_names) == classes


# ---- what is there already ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "there", ["png 4/000000.png", "png x/y/photo.JPG", "flat x.png", "npz samples.npz", "grid 4_000000.png"]
)
def test_old_images_among_new_ones_are_refused(student, tmp_path, there):
    """Nothing is deleted or written."""
    format, there = there.split()
    (tmp_path / there).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / there).write_bytes(b"mine")
    with pytest.raises(UserError, match=f"--output_dir {tmp_path}: holds {there}; choose another"):
        generated(student, tmp_path, "--format", format)
    assert contents(tmp_path) == {there: b"mine"}


def test_formats_share_a_folder_where_no_reader_mixes_them_up(student, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for format, folder in (("grid", "."), ("npz", "teacher"), ("npz", "."), ("png", ".")):
        generated(student, tmp_path / folder, "--format", format)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_nothing_is_written_before_sampling_has_succeeded(student, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "choose_sampler", lambda *arguments: (lambda *batch: 1 / 0, 1))
    with pytest.raises(ZeroDivisionError):
        generated(student, tmp_path)
    assert not contents(tmp_path)


# ---- names of classes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["grid", "png", "flat"])
def test_names_of_classes_make_safe_file_names(tmp_path, format):
    """Not empty, nowhere else, apart from one another, and short enough for the file system."""
    names = ["", "..", "a/b", "A b", "/x", "\N{GRINNING FACE}" * 300, "é" * 300, "é" * 299]
    generated(untrained(tmp_path / "x.pt", names), tmp_path / "in" / "out", "--format", format)
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["out"]
    assert {path.name for path in tmp_path.iterdir()} == {"in", "x.pt"}
    assert len(contents(tmp_path / "in" / "out")) == (2 * len(names) if format != "grid" else len(names) + 1)
    assert generate.file_names(["T-shirt/top", ""]) == ["t-shirt_top", "_"]


def test_classes_are_asked_for_by_name():
    """In their order, each once; all by default. An unknown one is refused."""
    names = ["a", "b", "c d"]
    assert generate.choose_classes(["c d", "a", "a"], names) == [2, 0]
    assert generate.choose_classes(None, names) == [0, 1, 2] and generate.choose_classes(None, []) == [0]
    assert generate.choose_classes(None, ["a", "a"]) == [0, 1]
    assert generate.choose_classes(["\u00fcber"], ["a", "u\u0308ber"]) == [1]  # decomposed, as on macOS
    with pytest.raises(UserError, match=r"no class 'c'.*; there are a, b, c d"):
        generate.choose_classes(["a", "c"], names)
    with pytest.raises(UserError, match="there are no classes"):
        generate.choose_classes(["a"], [])
