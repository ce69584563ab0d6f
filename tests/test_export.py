import importlib.util
import json
import sys
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_script, tiny_unet
from test_config import assert_refused

import checkpoint
import export
from networks.song_unet import SongUNet
from sampling import class_noise, few_step_sampler, one_step_sampler
from support.config import UserError
from support.images import to_uint8

MISSING = [name for name in ("onnx", "onnxruntime", "onnxscript") if not importlib.util.find_spec(name)]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"needs {MISSING}")


def write_generator(path, net, raw="feedforward_model_state_dict", sigmas=(40.0,)):
    state = {raw: net.state_dict(), "ema_state_dict": None, "step": 7, "model_config": net.config, "config": {}}
    checkpoint.save(path, state | {"student_sigmas": list(sigmas), "class_names": [f"class {n}" for n in range(net.label_dim)]})
    return path


def tiny_song(label_dim=3, **changes):
    torch.manual_seed(0)
    return SongUNet(img_resolution=8, label_dim=label_dim, model_channels=8, num_blocks=1, attn_resolutions=(), **changes).eval()


def exported(source, output=None, page=None, ort=None, overwrite=False):
    options = dict(format="onnx", page=page, ort=ort, overwrite=overwrite)
    export.main(Namespace(checkpoint=str(source), output=output and str(output), **options))


@needs_onnx
@pytest.mark.parametrize(
    "build, sigmas",
    [
        (lambda: tiny_unet(channel_mult=(1,), attn_resolutions=[8], img_channels=3), [40.0]),
        (lambda: tiny_song(channel_mult=(1, 1), encoder_type="residual", resample_filter=(1, 3, 3, 1)), [80.0, 2.0]),
        (lambda: tiny_unet(label_dim=0, channel_mult=(1,)), [80.0, 20.0, 2.0]),
    ],
    ids=["SimpleUNet", "SongUNet in two steps", "three steps without classes"],
)
def test_onnx_makes_the_same_images(tmp_path, build, sigmas):
    """onnxruntime against the sampler with the same noise at each level, at batch sizes other than the exported one.

    Images are clamped, and pixels are the rounded images. There is one file, with metadata. A label outside the classes fails.
    """
    import onnxruntime

    net = build()
    with torch.no_grad():
        net.conv_out.weight *= 4  # so that some of the images leave [-1, 1]
    exported(write_generator(tmp_path / "x.pt", net, sigmas=sigmas), tmp_path / "new" / "x.onnx")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["x.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "new" / "x.onnx", providers=["CPUExecutionProvider"])
    facts = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
    assert facts["class_names"] == [f"class {n}" for n in range(net.label_dim)] and facts["versions"] == checkpoint.versions()
    assert facts["step"] == 7 and facts["student_sigmas"] == sigmas and facts["network_evaluations"] == len(sigmas)
    assert facts["shape"] == [net.config["img_channels"], 8, 8]

    for num_samples in (1, 4):
        noise, labels = class_noise(range(net.label_dim) or [0], num_samples, facts["shape"], seed=5)
        draw = torch.Generator().manual_seed(6)
        feeds = {"noise": noise} | {f"noise_{n}": torch.randn(noise.shape, generator=draw) for n in range(1, len(sigmas))}
        feeds = {name: array.numpy() for name, array in (feeds | ({"labels": labels} if net.label_dim else {})).items()}
        assert [put.name for put in session.get_inputs()] == list(feeds)
        images, pixels = session.run(["images", "pixels"], feeds)
        with torch.no_grad():
            expected = few_step_sampler(net, noise, labels, sigmas, torch.Generator().manual_seed(6))
        assert expected.abs().max() > 1
        np.testing.assert_allclose(images, expected.clamp(-1, 1).numpy(), rtol=0, atol=1e-4)
        assert pixels.dtype == np.uint8 and pixels.shape == (len(labels), 8, 8, net.config["img_channels"])
        np.testing.assert_allclose(pixels, to_uint8(expected).permute(0, 2, 3, 1).numpy(), atol=1)
    for wrong in (net.label_dim, -1) if net.label_dim else ():
        with pytest.raises(Exception, match=f"invalid index found, index = {net.label_dim}"):
            session.run(["pixels"], feeds | {"labels": np.full(len(labels), wrong)})


@needs_onnx
def test_of_many_classes_ten_are_checked():
    """1,000 classes at 64x64 would take a CPU hours."""
    for classes, checked in ((1, 1), (10, 10), (11, 6), (1000, 10)):
        model = SimpleNamespace(net=SimpleNamespace(label_dim=classes), input_names=["noise", "noise_1", "labels"])
        noise, noise_1, labels = export.example(model, [1, 8, 8], 3, seed=0)
        assert len(labels.unique()) == checked and len(labels) == len(noise) == len(noise_1) == 3 * checked
        assert not torch.equal(noise, noise_1)


@pytest.mark.parametrize("wrong, message", [(2e-4, "by 2.0e-04"), (float("nan"), "by nan"), (200.0, "by inf")])
def test_a_file_that_fails_its_check_is_not_left(tmp_path, monkeypatch, wrong, message):
    """The exporter is replaced by one that writes a file, the runtime by PyTorch with an added error. An existing file stays."""
    net = tiny_song(channel_mult=(1,))

    def run_wrongly(names, inputs):
        noise, labels = (torch.from_numpy(array) for array in inputs.values())
        with torch.no_grad():
            images = one_step_sampler(net, noise, labels, 40.0)
        if len(labels) > net.label_dim and not wrong > 1:
            images[-1, 0, 0, 0] += wrong  # in one place, and only at the second batch size
        pixels = to_uint8(images + (wrong if wrong > 1 else 0.0)).permute(0, 2, 3, 1)  # 200: the pixels alone are wrong
        return [images.numpy(), pixels.numpy()]

    monkeypatch.setattr(export, "find_spec", lambda name: True)
    monkeypatch.setitem(
        sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=lambda *a, **k: SimpleNamespace(run=run_wrongly))
    )
    program = SimpleNamespace(model=SimpleNamespace(metadata_props={}), save=lambda file, external_data: file.write_bytes(b"new"))
    monkeypatch.setattr(torch.onnx, "export", lambda model, inputs, **options: program)
    source, output = write_generator(tmp_path / "x.pt", net), tmp_path / "out" / "x.onnx"
    with pytest.raises(UserError, match=f"not written: .* {message}"):
        exported(source, output)
    assert not list(output.parent.iterdir())
    output.write_bytes(b"old")
    with pytest.raises(UserError):
        exported(source, output, overwrite=True)
    assert [file.read_bytes() for file in output.parent.iterdir()] == [b"old"]


def test_without_the_packages_export_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: name == "onnx")
    with pytest.raises(UserError, match="pip install onnxruntime onnxscript"):
        exported(tmp_path / "x.pt", tmp_path / "x.onnx")


@needs_onnx
def test_a_file_in_the_place_of_a_folder_is_told(tmp_path):
    generator = write_generator(tmp_path / "x.pt", tiny_unet())
    done = run_script("export.py", "--checkpoint", generator, "--output", generator / "x.onnx")
    assert done.returncode == 2 and "could not be written" in done.stderr and "Traceback" not in done.stderr


@needs_onnx
def test_a_teacher_is_not_exported(tmp_path):
    teacher = write_generator(tmp_path / "x.pt", tiny_unet(), raw="model_state_dict")
    done = run_script("export.py", "--checkpoint", teacher, "--output", tmp_path / "x.onnx")
    assert_refused(done, "a teacher; export.py takes a generator")
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]


@needs_onnx
@pytest.mark.parametrize("option, there", [("--output", "x.onnx"), ("--page", "index.html"), ("--page", "generator.onnx")])
def test_what_is_there_stays(tmp_path, option, there):
    generator = write_generator(tmp_path / "x.pt", tiny_unet())
    (tmp_path / there).write_bytes(b"old")
    given = tmp_path / there if option == "--output" else tmp_path
    done = run_script("export.py", "--checkpoint", generator, option, given)
    assert_refused(done, f"{tmp_path / there} exists; choose another path, or replace it with --overwrite")
    assert (tmp_path / there).read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2


def test_options_that_exclude_each_other():
    assert_refused(run_script("export.py", "--output", "x.onnx", "--page", "x"), "--output and --page: give only one of them")
    assert_refused(run_script("export.py", "--ort", "x"), "--ort names the runtime of a page: add --page")
