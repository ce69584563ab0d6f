import importlib.util
import json
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import flags, refuses, tiny_unet

import checkpoint
import export
from networks.edm_unet import SongUNet
from sampling import class_noise, few_step_sampler
from support.script import UserError

MISSING = [name for name in ("onnx", "onnxruntime", "onnxscript") if not importlib.util.find_spec(name)]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"needs {MISSING}")


def write_generator(file, net, raw="feedforward_model_state_dict", sigmas=(40.0,)):
    state = {raw: net.state_dict(), "step": 7, "model_config": net.config, "config": {}}
    names = [f"class {label}" for label in range(net.label_dim)]
    checkpoint.save(file, state | {"student_sigmas": list(sigmas), "class_names": names})
    return file


def unet():
    return tiny_unet(channel_mult=(1,), attn_resolutions=[8], img_channels=3)


def song_unet():
    torch.manual_seed(0)
    return SongUNet(img_resolution=8, model_channels=8, channel_mult=(1, 1), num_blocks=1, label_dim=0).eval()


@needs_onnx
@pytest.mark.parametrize(
    "build, sigmas, inputs",
    [(unet, [40.0], ["noise", "labels"]), (song_unet, [80.0, 20.0, 2.0], ["noise", "noise_1", "noise_2"])],
)
def test_onnx_makes_the_same_images(tmp_path, build, sigmas, inputs):
    """onnxruntime against the sampler with the same noise at each level, at batch sizes other than the exported one.

    Images are clamped. A label outside the classes fails. What a killed export left
    goes with the next.
    """
    import onnxruntime

    net = build()
    with torch.no_grad():
        net.conv_out.weight *= 4  # so that some of the images leave [-1, 1]
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "x.onnx.tmp").write_text("of a killed export")
    source = write_generator(tmp_path / "x.pt", net, sigmas=sigmas)
    export.main(flags(checkpoint=source, output=tmp_path / "new" / "x.onnx"))
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["x.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "new" / "x.onnx", providers=["CPUExecutionProvider"])
    facts = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
    names = [f"class {label}" for label in range(net.label_dim)]
    expected = dict(shape=[3, 8, 8], student_sigmas=sigmas, step=7, class_names=names, versions=checkpoint.versions())
    assert facts == expected

    names = [put.name for put in session.get_inputs()]
    assert names == inputs
    for num_samples in (1, 4):
        noise, labels = class_noise(range(net.label_dim), num_samples, [3, 8, 8], seed=5)
        fresh_noise = [torch.randn(noise.shape) for _ in sigmas[1:]]
        feeds = dict(zip(names, [noise.numpy(), *(e.numpy() for e in fresh_noise), labels.numpy()], strict=False))
        (images,) = session.run(["images"], feeds)
        with torch.no_grad():
            expected = few_step_sampler(net, noise, labels, sigmas, fresh_noise=fresh_noise)
        assert expected.abs().max() > 1
        np.testing.assert_allclose(images, expected.clamp(-1, 1).numpy(), rtol=0, atol=1e-4)
    for wrong in (net.label_dim, -1) if net.label_dim else ():
        with pytest.raises(Exception, match=f"invalid index found, index = {net.label_dim}"):
            session.run(["images"], feeds | {"labels": np.full(len(labels), wrong)})


def test_of_many_classes_ten_are_checked():
    """1,000 classes at 64x64 would take a CPU hours."""
    for classes, checked in ((1, 1), (10, 10), (11, 6), (1000, 10)):
        model = SimpleNamespace(net=SimpleNamespace(label_dim=classes), student_sigmas=[80.0, 2.0])
        noise, noise_1, labels = export.example(model, [1, 8, 8], 3, seed=0).values()
        assert len(labels.unique()) == checked and len(labels) == len(noise) == len(noise_1) == 3 * checked
        assert not torch.equal(noise, noise_1)


@pytest.mark.parametrize("wrong, found", [(2e-4, "2.0e-04"), (float("nan"), "nan")])
def test_a_wrong_file_is_not_written(tmp_path, monkeypatch, wrong, found):
    """In place of the runtime PyTorch itself, with an error in one place, and only at the second batch size."""
    model = export.Deployed(unet(), [40.0])

    def run(names, inputs):
        with torch.no_grad():
            images = model(*map(torch.from_numpy, inputs.values()))
        if len(images) > 10:
            images[-1, 0, 0, 0] += wrong
        return [images.numpy()]

    for module in ("onnx", "onnxruntime", "onnxscript"):  # the exporter does nothing, and the runtime is PyTorch
        monkeypatch.setitem(sys.modules, module, MagicMock())
    sys.modules["onnxruntime"].InferenceSession.return_value.run = run
    monkeypatch.setattr(torch.onnx, "export", MagicMock())
    with pytest.raises(UserError, match=f"not written: .* by {found}"):
        export.write_onnx(tmp_path / "x.onnx", model, {"shape": [3, 8, 8]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], None),
        (["--output", "folder", "--overwrite"], "folder exists; choose another path"),
        (["--output", "old.onnx"], "old.onnx exists; choose another path, or replace a file with --overwrite"),
        pytest.param(["--output", "generator.pt/x.onnx"], "--output generator.pt: ", marks=needs_onnx),
        pytest.param(["--checkpoint", "teacher.pt"], "a teacher; export.py takes a generator", marks=needs_onnx),
    ],
)
def test_mistakes_are_refused_and_nothing_is_written(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    if not message:
        monkeypatch.setattr(export, "find_spec", lambda name: name == "onnx")
        message = "pip install onnxruntime onnxscript"
    write_generator(tmp_path / "generator.pt", tiny_unet(channel_mult=(1,)))
    write_generator(tmp_path / "teacher.pt", tiny_unet(), raw="model_state_dict")
    for file in ("folder/x", "old.onnx"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"old")
    before = {file: file.is_dir() or file.read_bytes() for file in tmp_path.rglob("*")}
    refuses(message, "export.py", "--checkpoint", "generator.pt", *arguments)
    assert {file: file.is_dir() or file.read_bytes() for file in tmp_path.rglob("*")} == before
