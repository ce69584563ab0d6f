import importlib.util
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
from sampling import class_noise, one_step_sampler
from support.config import UserError
from support.images import to_uint8

MISSING = [name for name in ("onnx", "onnxruntime", "onnxscript") if not importlib.util.find_spec(name)]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"needs {MISSING}")


def write_generator(path, net, raw="feedforward_model_state_dict"):
    state = {raw: net.state_dict(), "ema_state_dict": None, "step": 1, "model_config": net.config}
    checkpoint.save(path, state | {"config": {"conditioning_sigma": 40.0}, "class_names": [str(n) for n in range(net.label_dim)]})
    return path


def tiny_song(**changes):
    torch.manual_seed(0)
    return SongUNet(img_resolution=8, label_dim=3, model_channels=8, num_blocks=1, attn_resolutions=(), **changes).eval()


def exported(source, output):
    export.main(Namespace(checkpoint=str(source), output=str(output), format="onnx"))


@needs_onnx
@pytest.mark.parametrize(
    "build",
    [
        lambda: tiny_unet(channel_mult=(1,), attn_resolutions=[8], img_channels=3),
        lambda: tiny_song(channel_mult=(1, 1), encoder_type="residual", resample_filter=(1, 3, 3, 1)),
    ],
    ids=["SimpleUNet", "SongUNet"],
)
def test_onnx_makes_the_same_images(tmp_path, build):
    """onnxruntime against PyTorch at batch sizes that the file was not made with; pixels are the images, rounded; one file."""
    import onnxruntime

    net = build()
    exported(write_generator(tmp_path / "x.pt", net), tmp_path / "new" / "x.onnx")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["x.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "new" / "x.onnx", providers=["CPUExecutionProvider"])
    for num_samples in (1, 4):
        noise, labels = class_noise(range(net.label_dim), num_samples, (3, 8, 8), seed=5)
        images, pixels = session.run(["images", "pixels"], {"noise": noise.numpy(), "labels": labels.numpy()})
        with torch.no_grad():
            expected = one_step_sampler(net, noise, labels, 40.0)
        np.testing.assert_allclose(images, expected.numpy(), rtol=0, atol=1e-4)
        assert pixels.dtype == np.uint8 and pixels.shape == (len(labels), 8, 8, 3)
        np.testing.assert_allclose(pixels, to_uint8(expected).permute(0, 2, 3, 1).numpy(), atol=1)


@pytest.mark.parametrize("wrong, message", [(2e-4, "2.0e-04 away"), (float("nan"), "nan away"), (200.0, "inf away")])
def test_a_file_that_fails_its_check_is_not_left(tmp_path, monkeypatch, wrong, message):
    """The exporter replaced by one that writes a file, the runtime by PyTorch with an error put in; what was there stays."""
    net = tiny_song(channel_mult=(1,))

    def run_wrongly(names, inputs):
        noise, labels = (torch.from_numpy(array) for array in inputs.values())
        with torch.no_grad():
            images = one_step_sampler(net, noise, labels, 40.0)
        if len(labels) > net.label_dim and not wrong > 1:
            images[-1, 0, 0, 0] += wrong  # in one place, and at the second batch size alone
        pixels = to_uint8(images + (wrong if wrong > 1 else 0.0)).permute(0, 2, 3, 1)  # 200: the pixels alone are wrong
        return [images.numpy(), pixels.numpy()]

    monkeypatch.setattr(export, "find_spec", lambda name: True)
    monkeypatch.setitem(
        sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=lambda *a, **k: SimpleNamespace(run=run_wrongly))
    )
    monkeypatch.setattr(torch.onnx, "export", lambda model, inputs, file, **options: file.write_bytes(b"new"))
    source, output = write_generator(tmp_path / "x.pt", net), tmp_path / "out" / "x.onnx"
    with pytest.raises(UserError, match=f"not written: .* {message}"):
        exported(source, output)
    assert not list(output.parent.iterdir())
    output.write_bytes(b"old")
    with pytest.raises(UserError):
        exported(source, output)
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
    assert_refused(done, "a teacher; only a generator makes an image in one step")
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]
