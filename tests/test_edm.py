import io
import os
import pickle
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_script, succeed
from test_config import assert_refused

import checkpoint
import import_edm
import safe_pickle
from config import UserError
from edm_model import SongUNet
from guidance import GuidanceModel
from model import preconditioning
from sampling import heun_sampler
from unified_model import UnifiedModel

TINY = dict(resolution=8, width=16, mult=(1, 2), blocks=1, attention=(4,), classes=10)
DDPMPP, NCSNPP = dict(taps=(1, 1)), dict(taps=(1, 3, 3, 1), residual=True, noise_mult=2)
FULL = dict(resolution=32, width=128, mult=(2, 2, 2), blocks=4, attention=(16,), classes=10)


# ---- EDM's network as its files hold it, and what it computes: written here once more, without edm_model.py ----------------


def edm_shapes(resolution, width, mult, blocks, attention, classes, taps, residual=False, noise_mult=1, colours=3, augment=9):
    """The names and shapes of the tensors of EDM's SongUNet, in its order."""
    shapes, emb = {}, 4 * width

    def layer(name, *shape):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def lowpass(name):
        shapes[f"{name}.resample_filter"] = (1, 1, len(taps), len(taps))

    def block(name, wide_in, wide_out, attend=False, resample=False):
        layer(f"{name}.norm0", wide_in)
        layer(f"{name}.conv0", wide_out, wide_in, 3, 3)
        layer(f"{name}.affine", wide_out, emb)
        layer(f"{name}.norm1", wide_out)
        layer(f"{name}.conv1", wide_out, wide_out, 3, 3)
        if resample or wide_in != wide_out:
            layer(f"{name}.skip", wide_out, wide_in, 1, 1)
        if resample:
            lowpass(f"{name}.conv0")
            lowpass(f"{name}.skip")
        if attend:
            layer(f"{name}.norm2", wide_out)
            layer(f"{name}.qkv", 3 * wide_out, wide_out, 1, 1)
            layer(f"{name}.proj", wide_out, wide_out, 1, 1)

    if residual:
        shapes["map_noise.freqs"] = (noise_mult * width // 2,)
    layer("map_label", noise_mult * width, classes)
    if augment:
        shapes["map_augment.weight"] = (noise_mult * width, augment)
    layer("map_layer0", emb, noise_mult * width)
    layer("map_layer1", emb, emb)

    sides = [f"{resolution >> level}x{resolution >> level}" for level in range(len(mult))]
    layer(f"enc.{sides[0]}_conv", width, colours, 3, 3)
    now, image, skips = width, colours, [width]
    for level, side in enumerate(sides):
        if level:
            block(f"enc.{side}_down", now, now, resample=True)
            skips.append(now)
        if level and residual:
            layer(f"enc.{side}_aux_residual", now, image, 3, 3)
            lowpass(f"enc.{side}_aux_residual")
            image = now
        for index in range(blocks):
            block(f"enc.{side}_block{index}", now, width * mult[level], resolution >> level in attention)
            now = width * mult[level]
            skips.append(now)
    for level, side in reversed(list(enumerate(sides))):
        if level == len(sides) - 1:
            block(f"dec.{side}_in0", now, now, attend=True)
            block(f"dec.{side}_in1", now, now)
        else:
            block(f"dec.{side}_up", now, now, resample=True)
        for index in range(blocks + 1):
            block(
                f"dec.{side}_block{index}",
                now + skips.pop(),
                width * mult[level],
                index == blocks and resolution >> level in attention,
            )
            now = width * mult[level]
    layer(f"dec.{sides[0]}_aux_norm", now)
    layer(f"dec.{sides[0]}_aux_conv", colours, now, 3, 3)
    return shapes


def edm_tensors(taps, **changes):
    """Random weights by EDM's names, of a size that keeps activations near 1."""
    torch.manual_seed(0)
    tensors = {}
    for name, shape in edm_shapes(**{**TINY, **changes}, taps=taps).items():
        fan_in = torch.Size(shape[1:]).numel()
        if name.endswith("resample_filter"):
            tensors[name] = torch.outer(torch.tensor(taps), torch.tensor(taps))[None, None] / sum(taps) ** 2
        elif name.endswith("freqs"):
            tensors[name] = 16 * torch.randn(shape)
        elif len(shape) == 1:
            tensors[name] = ("norm" in name and name.endswith("weight")) + 0.1 * torch.randn(shape)
        else:
            tensors[name] = torch.randn(shape) / fan_in**0.5
    return tensors


def edm_denoise(tensors, x, sigma, labels):
    """D(x; sigma, class) of EDM's preconditioned SongUNet, in the order of `tensors`, which gives the architecture."""

    def weights(name):
        return tensors[f"{name}.weight"], tensors[f"{name}.bias"]

    def conv(name, h):
        return F.conv2d(h, *weights(name), padding=tensors[f"{name}.weight"].shape[-1] // 2)

    def norm(name, h):
        return F.group_norm(h, min(32, h.shape[1] // 4), *weights(name), eps=1e-6)

    def resample(name, h, dim, up, pad=None):
        """One dimension: windows of the (for `up` zero-stuffed) pixels times the taps."""
        kernel = tensors[f"{name}.resample_filter"][0, 0]
        taps, pad = kernel.sum(0), (len(kernel) - 1) // 2 if pad is None else pad
        if up:
            stuffed = h.new_zeros([2 * n - 1 if d == dim else n for d, n in enumerate(h.shape)])
            stuffed.narrow(dim, 0, stuffed.shape[dim]).index_copy_(dim, torch.arange(0, stuffed.shape[dim], 2), h)
            h, taps, pad = stuffed, 2 * taps, len(taps) - 1 - pad
        h = F.pad(h, (pad, pad, 0, 0) if dim == 3 else (0, 0, pad, pad))
        return (h.unfold(dim, len(taps), 1 if up else 2) * taps).sum(-1)

    def both_ways(name, h, up=False, pad=None):
        return resample(name, resample(name, h, 2, up, pad), 3, up, pad)

    def block(name, h):
        old, new = h, F.silu(norm(f"{name}.norm0", h))
        if f"{name}.conv0.resample_filter" in tensors:
            old, new = both_ways(f"{name}.skip", old, "up" in name), both_ways(f"{name}.conv0", new, "up" in name)
        new = conv(f"{name}.conv0", new) + F.linear(emb, *weights(f"{name}.affine")).unflatten(1, (-1, 1, 1))
        new = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", new)))
        h = ((conv(f"{name}.skip", old) if f"{name}.skip.weight" in tensors else old) + new) * 0.5**0.5
        if f"{name}.qkv.weight" in tensors:
            qkv = conv(f"{name}.qkv", norm(f"{name}.norm2", h)).flatten(2)
            q, k, v = qkv[:, 0::3], qkv[:, 1::3], qkv[:, 2::3]
            attended = v @ (k.mT @ q / h.shape[1] ** 0.5).softmax(dim=1)
            h = (h + conv(f"{name}.proj", attended.reshape(h.shape))) * 0.5**0.5
        return h

    c_skip, c_out, c_in, c_noise = preconditioning(torch.full((len(x), 1, 1, 1), sigma), 0.5)
    half = tensors["map_layer0.weight"].shape[1] // 2
    freqs = tensors.get("map_noise.freqs", torch.logspace(0, -4, half) / (2 * np.pi)) * (2 * np.pi)
    waves = c_noise.flatten(1) * freqs
    one_hot = F.one_hot(labels, tensors["map_label.weight"].shape[1]).float()
    emb = torch.cat([waves.sin(), waves.cos()], 1) + F.linear(one_hot * one_hot.shape[1] ** 0.5, *weights("map_label"))
    emb = F.silu(F.linear(F.silu(F.linear(emb, *weights("map_layer0"))), *weights("map_layer1")))

    h, skips, image = c_in * x, [], c_in * x
    for name in dict.fromkeys(".".join(name.split(".")[:2]) for name in tensors if name.startswith(("enc", "dec"))):
        if name.endswith("_conv") and "aux" not in name:
            h = conv(name, h)
        elif "aux_residual" in name:
            pad = tensors[f"{name}.resample_filter"].shape[-1] // 2
            image = both_ways(name, F.conv2d(image, *weights(name), padding=pad), pad=0)
            h = image = skips.pop().add(image) * 0.5**0.5
        elif "aux_norm" in name:
            h = F.silu(norm(name, h))
        elif "aux_conv" in name:
            h = conv(name, h)
        else:
            wanted = tensors[f"{name}.norm0.weight"].shape[0]
            h = block(name, h if h.shape[1] == wanted else torch.cat([h, skips.pop()], 1))
        if name.startswith("enc"):
            skips.append(h)
    return c_skip * x + c_out * h


# ---- its file -------------------------------------------------------------------------------------------------------------


class Persistent:
    """An object as NVIDIA's `torch_utils.persistence` writes it: its class's name and source, and its attributes."""

    def __init__(self, class_name, module_src="", **state):
        self.meta = {"type": "class", "version": 6, "module_src": module_src, "class_name": class_name, "state": state}

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


def module(class_name, tensors, children=(), **state):
    """`tensors` by dotted names as nested modules; `enc` and `dec` are torch's own ModuleDict, all others NVIDIA's classes."""
    own = {name: tensor for name, tensor in tensors.items() if "." not in name}
    buffers = {name: tensor for name, tensor in own.items() if name in ("freqs", "resample_filter")}
    children = dict(children)
    for name in dict.fromkeys(name.partition(".")[0] for name in tensors if "." in name):
        inner = {key.partition(".")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        if name in ("enc", "dec"):
            children[name] = torch.nn.ModuleDict()
            children[name]._modules = module("", inner).meta["state"]["_modules"]
        else:
            children[name] = module("Layer", inner, skip_scale=np.sqrt(0.5))
    return Persistent(
        class_name,
        _parameters={name: torch.nn.Parameter(tensor, False) for name, tensor in own.items() if name not in buffers}
        | {"none": None},
        _buffers=buffers | {"none": None},
        _modules=children,
        _non_persistent_buffers_set=set(),
        training=False,
        **state,
    )


def edm_network(tensors, precond="EDMPrecond", unet="SongUNet", source=""):
    """EDM's network with these weights, as the entry `ema` of its file has it."""
    inner = module(unet, tensors, _init_kwargs={"dropout": 0.11})
    network = module(precond, {}, {"model": inner}, sigma_data=0.5, use_fp16=False)
    network.meta["module_src"] = source
    return network


def write_pickle(path, content):
    """Pickles `content` while stand-ins for NVIDIA's two modules are in place."""

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("called")

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    easy_dict = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})
    stand_ins = {"torch_utils": types.ModuleType("torch_utils"), "dnnlib": types.ModuleType("dnnlib")}
    stand_ins["torch_utils.persistence"] = types.SimpleNamespace(_reconstruct_persistent_obj=_reconstruct_persistent_obj)
    stand_ins["dnnlib.util"] = types.SimpleNamespace(EasyDict=easy_dict)
    sys.modules.update(stand_ins)
    try:
        content = {**content, "dataset_kwargs": easy_dict(path="cifar10.zip", use_labels=True)}
        path.write_bytes(pickle.dumps(content, protocol=4))
    finally:
        for name in stand_ins:
            del sys.modules[name]
    return path


def write_edm(path, **changes):
    """A small pickle of the published structure."""
    return write_pickle(
        path, {"ema": edm_network(edm_tensors(**{**DDPMPP, **changes})), "loss_fn": Persistent("EDMLoss", P_mean=-1.2)}
    )


def imported(source, folder):
    """The checkpoint that import_edm.py makes of `source` in `folder`/imported, by its own main."""
    output = folder / "imported" / f"{source.name}.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["import_edm.py", "--source", str(source), "--output", str(output)])
        import_edm.main()
    return output


def assert_import_refused(source, folder, message):
    with pytest.raises(UserError) as refusal:
        imported(source, folder)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (folder / "imported").exists()


# ---- the network ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [DDPMPP, NCSNPP], ids=["ddpmpp", "ncsnpp"])
def test_imported_network_computes_what_edms_does(tmp_path, form):
    """Against the functional copy above, to 1e-5, from the least to the most noise and for every class; pickle and state_dict."""
    tensors = edm_tensors(**form)
    source = write_edm(tmp_path / "a.pkl", **form)
    torch.save({f"model.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "b.pth")
    x, labels = torch.randn(10, 3, 8, 8), torch.arange(10)
    for file, dropout in ((source, 0.11), (tmp_path / "b.pth", 0.13)):
        net = checkpoint.load_network(imported(file, tmp_path))
        assert not net.training and net.config["dropout"] == dropout
        for sigma in (0.002, 0.05, 1.0, 80.0):
            noisy = x * (0.5**2 + sigma**2) ** 0.5
            expected = edm_denoise(tensors, noisy, sigma, labels)
            torch.testing.assert_close(net(noisy, sigma, labels), expected, rtol=0, atol=1e-5)
            assert (expected - noisy * 0.25 / (0.25 + sigma**2)).std() > 0.3 * min(sigma, 0.5)  # the network has its say


@pytest.mark.parametrize(
    "changes",
    [
        dict(mult=(2,), attention=()),
        dict(mult=(1, 2, 1), blocks=2, attention=(8, 2), **NCSNPP),
        dict(classes=3, width=24, colours=1, augment=0),
        dict(resolution=16, mult=(1, 1, 1), attention=(16, 8)),
    ],
)
def test_architecture_is_told_by_the_tensors(changes):
    """Other depths, widths, classes, colours and attention than the published ones."""
    tensors = edm_tensors(**{**DDPMPP, **changes})
    net = SongUNet(**import_edm.architecture(tensors)).eval()
    net.load_state_dict(import_edm.convert(tensors, net)[0])
    shape = {**TINY, "colours": 3, **changes}
    x = torch.randn(2, shape["colours"], shape["resolution"], shape["resolution"])
    labels = torch.tensor([0, shape["classes"] - 1])
    torch.testing.assert_close(net(x, 1.0, labels), edm_denoise(tensors, x, 1.0, labels), rtol=0, atol=1e-5)


def test_default_is_the_published_cifar10_network():
    """Every name and shape of the file, 55.7 M parameters with the layer left out; and the same of NCSN++."""
    ncsnpp = dict(embedding_type="fourier", channel_mult_noise=2, encoder_type="residual", resample_filter=[1, 3, 3, 1])
    for form, arguments, millions in ((DDPMPP, {}, 55.735), (NCSNPP, ncsnpp, 56.401)):
        with torch.device("meta"):
            net = SongUNet(**arguments)
            published = {name: torch.empty(shape) for name, shape in edm_shapes(**FULL, **form).items()}
        assert import_edm.architecture(published) | {"network": "SongUNet", "dropout": 0.13, "sigma_data": 0.5} == net.config
        ours = {import_edm.edm_name(name, net.config): tensor.shape for name, tensor in net.state_dict().items()}
        theirs = {name: tensor.shape for name, tensor in published.items() if not name.endswith("resample_filter")}
        left_out = theirs.pop("map_augment.weight")
        assert ours == theirs and len(ours) == len(net.state_dict())
        assert round((sum(p.numel() for p in net.parameters()) + left_out.numel()) / 1e6, 3) == millions
        assert net.bottleneck_channels == 256 and net.norm_out.num_groups == 32


def test_call_signature_is_simple_unets(tmp_path):
    """One-hot equals index, a scalar sigma equals a vector, images do not see each other; bottleneck; rebuilt from its config."""
    net = checkpoint.load_network(imported(write_edm(tmp_path / "a.pkl", **NCSNPP), tmp_path))
    x, labels = torch.randn(3, 3, 8, 8), torch.tensor([1, 2, 9])
    out = net(x, torch.full((3,), 2.0), labels)
    torch.testing.assert_close(net(x, 2.0, F.one_hot(labels, 10)), out)
    torch.testing.assert_close(net(x[1:2], torch.tensor(2.0), labels[1:2]), out[1:2], rtol=0, atol=1e-5)
    features = net(x, 2.0, labels, return_bottleneck=True)
    assert features.shape == (3, net.bottleneck_channels, 4, 4)
    torch.testing.assert_close(net(x, 2.0, labels, return_bottleneck="both"), (out, features))
    config = dict(net.config)
    assert config.pop("network") == "SongUNet" and SongUNet(**config).config == net.config
    with pytest.raises(ValueError, match="halved"):
        SongUNet(img_resolution=10, channel_mult=(1, 1, 1))


def test_distils_as_any_teacher(tmp_path):
    """Both turns with the GAN head, on the imported network; its samples by Heun's method are finite."""
    torch.manual_seed(0)
    net = checkpoint.load_network(imported(write_edm(tmp_path / "a.pkl"), tmp_path))
    model = UnifiedModel(GuidanceModel(net, gan_classifier=True)).eval()
    noise, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    losses, _, images = model.generator_turn(noise, labels)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.feedforward_model.parameters())
    assert all(p.grad is None for p in model.guidance_model.parameters())
    losses, _ = model.guidance_turn(images, labels, noise, labels)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.guidance_model.fake_unet.parameters())
    assert heun_sampler(net, noise, labels, num_steps=3).isfinite().all()


def test_unknown_network_class_is_refused(tmp_path):
    state = torch.load(imported(write_edm(tmp_path / "a.pkl"), tmp_path), weights_only=True)
    for config in ({"network": "Transformer"}, {**state["model_config"], "depth": 3}, 7):
        with pytest.raises(UserError, match="does not hold a SimpleUNet or SongUNet"):
            checkpoint.network({**state, "model_config": config}, "x.pt")


# ---- the import -----------------------------------------------------------------------------------------------------------


def test_import_by_command_line(tmp_path):
    """What is printed and written; fp16 storage; class names; the source code in the file stays unread; no silent overwriting."""
    tensors = {name: tensor.half() for name, tensor in edm_tensors(**DDPMPP).items()}
    source = write_pickle(tmp_path / "a.pkl", {"ema": edm_network(tensors, source=f"open({str(tmp_path / 'it-ran')!r}, 'w')")})
    output = tmp_path / "new" / "teacher.pt"
    out = succeed("import_edm.py", "--source", source, "--output", output)
    assert "left out: map_augment.weight [16, 9] (augmentation labels), 4 low-pass filters (constants)" in out
    state = checkpoint.load(output)
    assert checkpoint.kind(state) == "teacher" and state["class_names"][3] == "cat" and state["config"]["dataset"] == "cifar10"
    assert all(tensor.dtype == torch.float32 for tensor in state["ema_state_dict"].values())
    assert torch.equal(state["ema_state_dict"]["conv_in.weight"], tensors["enc.8x8_conv.weight"].float())
    assert not (tmp_path / "it-ran").exists()

    output = imported(write_edm(tmp_path / "b.pkl", classes=3), tmp_path)
    with pytest.raises(UserError, match="exists"):
        imported(tmp_path / "b.pkl", tmp_path)
    state = checkpoint.load(output)
    assert state["class_names"] == ["0", "1", "2"] and state["config"]["dataset"] == "folder"


def without(tensors, *names):
    return {key: tensor for key, tensor in tensors.items() if key not in names}


WRONG = {  # what is done to the tensors, what the one line must say
    "missing": (lambda t: without(t, "dec.8x8_up.skip.bias"), "no tensor dec.8x8_up.skip.bias"),
    "left over": (lambda t: {**t, "u": torch.ones(3)}, "tensor 'u' has no place in SongUNet"),
    "shape": (lambda t: {**t, "map_layer1.bias": torch.ones(3)}, "tensor map_layer1.bias is of shape [3], not [64]"),
    "not finite": (lambda t: {**t, "map_layer1.bias": torch.full((64,), torch.nan)}, "tensor map_layer1.bias is not finite"),
    "filter": (lambda t: {**t, "enc.4x4_down.skip.resample_filter": torch.ones(1, 1, 2, 2)}, "is not the low-pass of [1, 1]"),
    "no classes": (lambda t: without(t, "map_label.weight", "map_label.bias"), "trained without classes"),
    "other network": (lambda t: {"out_conv.weight": torch.ones(3)}, "not a SongUNet of EDM's: no tensor enc.32x32_conv.weight"),
    "no shapes": (lambda t: {**t, "enc.8x8_conv.weight": torch.ones(0, 0)}, "not a SongUNet of EDM's"),
    "no tensors": (lambda t: {"step": 3}, "no state_dict"),
}


@pytest.mark.parametrize("what", WRONG)
def test_other_tensors_are_refused(tmp_path, what):
    change, message = WRONG[what]
    torch.save(change(edm_tensors(**DDPMPP)), tmp_path / "a.pth")
    assert_import_refused(tmp_path / "a.pth", tmp_path, message)


class Call:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def with_parameter(value):
    """A network with one more parameter, `w`."""
    network = edm_network(edm_tensors(**DDPMPP))
    network.meta["state"]["_modules"]["model"].meta["state"]["_parameters"]["w"] = value
    return network


def loop():
    network = edm_network(edm_tensors(**DDPMPP))
    unet = network.meta["state"]["_modules"]["model"]
    unet.meta["state"]["_modules"]["again"] = module("Layer", {}, {"and_again": unet.meta["state"]["_modules"]["map_label"]})
    return network


OTHER = {  # other pickles, what the one line must say
    "other preconditioning": (
        lambda: {"ema": edm_network({}, precond="VPPrecond")},
        "preconditioned by 'VPPrecond'; only EDM's own",
    ),
    "other network": (lambda: {"ema": edm_network({}, unet="DhariwalUNet")}, "the network is a 'DhariwalUNet'; only SongUNet"),
    "number": (lambda: {"ema": 7}, "damaged, or not a network of EDM's"),
    "no network": (lambda: {"G_ema": 7}, "no entry `ema`"),
    "shared": (lambda: {"ema": loop()}, "the module 'again.and_again.' occurs twice"),
    "larger than stored": (
        lambda: {"ema": with_parameter(torch.nn.Parameter(torch.ones(1).expand(1 << 40), False))},
        "a tensor is larger than what is stored of it",
    ),
}


@pytest.mark.parametrize("what", OTHER)
def test_other_networks_are_refused(tmp_path, what):
    build, message = OTHER[what]
    assert_import_refused(write_pickle(tmp_path / "a.pkl", build()), tmp_path, message)


def hostile_bytes(command):
    """What torch.save writes of an object that runs `command` where it is loaded without `weights_only`."""
    buffer = io.BytesIO()
    torch.save(Call(os.system, command), buffer)
    return buffer.getvalue()


def hostile_storage(command):
    """A whole network, one of whose parameters has hostile bytes where a tensor's numbers belong."""
    storage = Call(torch.storage._load_from_bytes, hostile_bytes(command))
    return {"ema": with_parameter(Call(torch._utils._rebuild_tensor_v2, storage, 0, (1,), (1,), False, {}))}


def opcodes(*parts):
    return b"\x80\x04" + b"".join(parts) + b"."


HOSTILE = {  # command -> pickle, or what to pickle; what the one line must say
    "call": (lambda command: Call(os.system, command), "system'; nothing in it was run"),
    "eval": (lambda command: Call(eval, f"__import__('os').system({command!r})"), "it asks for 'builtins.eval'"),
    "beside a network": (lambda command: {"ema": edm_network({}), "x": [{"y": Call(os.system, command)}]}, "system'; nothing"),
    "function of torch": (lambda command: Call(torch.load, hostile_bytes(command)), "it asks to call 'torch.serialization.load'"),
    "tensor's bytes": (hostile_storage, "it holds more than tensors, or is damaged; nothing in it was run"),
    "state": (
        lambda command: opcodes(b"cfunctools\npartial\n)\x81(cos\nsystem\n", pickle.dumps((command,))[2:-1], b"tb"),
        "partial'",
    ),
    "class as a call": (
        lambda command: opcodes(b"cos\nsystem\n", pickle.dumps((command,))[2:-1], b"\x81"),
        "it asks for 'os.system'",
    ),
    "state of a name": (lambda command: opcodes(b"cdnnlib.util\nEasyDict\n}b"), "damaged, or no pickle"),
    "call of a record": (lambda command: opcodes(b"cany\nThing\n)\x81)R"), "damaged, or no pickle"),
    "huge memo": (lambda command: opcodes(b"Nr\xff\xff\xff\xff"), "no entry `ema`"),
    "huge bytes": (lambda command: opcodes(b"\x8e" + (1 << 40).to_bytes(8, "little")), "damaged, or no pickle"),
    "deep key": (lambda command: opcodes(b"})" + b"\x85" * 100_000 + b"Ns"), "keys are neither text nor numbers"),
    "registry": (lambda command: opcodes(b"\x82\x01"), "it has the opcode EXT1"),
    "text": (lambda command: b"no pickle", "damaged, or no pickle"),
    "cut": (lambda command: pickle.dumps(["a" * 99])[:50], "damaged, or no pickle"),
    "empty": (lambda command: b"", "damaged, or no pickle"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_pickles_are_refused_and_nothing_runs(tmp_path, what):
    build, message = HOSTILE[what]
    content = build(f"touch {tmp_path / 'it-ran'}")
    if isinstance(content, dict):
        write_pickle(tmp_path / "a.pkl", content)
    else:
        (tmp_path / "a.pkl").write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    assert_import_refused(tmp_path / "a.pkl", tmp_path, message)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("what", ["call", "eval"])
def test_hostile_pickles_are_hostile(tmp_path, what):
    """Python's own unpickler runs them: the test above does not pass for want of an attack."""
    pickle.loads(pickle.dumps(HOSTILE[what][0](f"touch {tmp_path / 'it-ran'}")))
    assert (tmp_path / "it-ran").exists()


def test_a_hostile_state_dict_is_refused(tmp_path):
    (tmp_path / "a.pth").write_bytes(hostile_bytes(f"touch {tmp_path / 'it-ran'}"))
    done = run_script("import_edm.py", "--source", tmp_path / "a.pth", "--output", tmp_path / "imported" / "x.pt")
    assert_refused(done, "it holds more than tensors, or is damaged; nothing in it was run")
    for name, message in (("none.pkl", "No such file"), (".", "Is a directory")):
        assert_import_refused(tmp_path / name, tmp_path, message)
    assert not (tmp_path / "it-ran").exists()


def test_a_damaged_pickle_gets_one_line(tmp_path):
    """Bytes changed at random: the file is refused in one line, or only numbers were hit."""
    good, random = write_edm(tmp_path / "a.pkl").read_bytes(), np.random.default_rng(0)
    for _ in range(25):
        bad = bytearray(good)
        for position in random.integers(0, len(bad), 20):
            bad[position] = random.integers(256)
        (tmp_path / "b.pkl").write_bytes(bad)
        try:
            imported(tmp_path / "b.pkl", tmp_path).unlink()
        except UserError as refusal:
            assert "\n" not in str(refusal)


def test_reader_gives_plain_data_and_records():
    """An instance of an unknown class, referred to twice, is one record with its state; sets are lists."""

    class Unknown:
        pass

    unknown = Unknown()
    unknown.x = [1, 2.5, None, True, b"b", ("t",), {"a"}, -(2**70)]
    Unknown.__module__, Unknown.__qualname__ = "elsewhere", "Unknown"
    sys.modules["elsewhere"] = types.SimpleNamespace(Unknown=Unknown)
    try:
        data = {protocol: pickle.dumps({"one": unknown, "two": unknown}, protocol) for protocol in (3, 4, 5)}
    finally:
        del sys.modules["elsewhere"]
    for protocol in data:
        content = safe_pickle.read(data[protocol])
        assert content["one"] is content["two"] and content["one"].made_by == "elsewhere.Unknown"
        assert content["one"].state == {"x": [1, 2.5, None, True, b"b", ("t",), ["a"], -(2**70)]}
