"""EDM's networks and their files, for tests: a second implementation of their computation and storage."""

import pickle
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import import_teacher
from model import preconditioning
from support.script import UserError

TINY = dict(resolution=8, width=16, mult=(1, 2), blocks=1, attention=(4,), classes=10)
DDPMPP, NCSNPP = dict(taps=(1, 1)), dict(taps=(1, 3, 3, 1), residual=True, noise_mult=2)
FULL = dict(resolution=32, width=128, mult=(2, 2, 2), blocks=4, attention=(16,), classes=10)


# ---- EDM's network as its files hold it, and what it computes: written here once more, without networks/ ------------


def edm_shapes(
    resolution, width, mult, blocks, attention, classes, taps, residual=False, noise_mult=1, colours=3, augment=9
):
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
    if classes:
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
    """D(x; sigma, class) of EDM's preconditioned SongUNet; the order of `tensors` defines the architecture."""

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
    emb = torch.cat([waves.sin(), waves.cos()], 1)
    if "map_label.weight" in tensors:
        one_hot = F.one_hot(labels, tensors["map_label.weight"].shape[1]).float()
        emb = emb + F.linear(one_hot * one_hot.shape[1] ** 0.5, *weights("map_label"))
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


# ---- its file -------------------------------------------------------------------------------------------------------


class Persistent:
    """An object as NVIDIA's `torch_utils.persistence` writes it: its class's name and source, and its attributes."""

    def __init__(self, class_name, module_src="", **state):
        self.meta = {"type": "class", "version": 6, "module_src": module_src, "class_name": class_name, "state": state}

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


def module(class_name, tensors, children=(), **state):
    """`tensors` by dotted names as nested modules; `enc` and `dec` are torch's, the others NVIDIA's classes."""
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
    stand_ins["torch_utils.persistence"] = types.SimpleNamespace(
        _reconstruct_persistent_obj=_reconstruct_persistent_obj
    )
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


def imported(source, folder, *arguments):
    """The checkpoint that import_teacher.py makes of `source` in `folder`/imported, by its own main."""
    output = folder / "imported" / f"{source.name}.pt"
    import_teacher.main(["--source", str(source), "--output", str(output), *arguments])
    return output


def assert_import_refused(source, folder, message):
    with pytest.raises(UserError) as refusal:
        imported(source, folder)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (folder / "imported").exists()


def with_parameter(value):
    """A network with one more parameter, `w`."""
    network = edm_network(edm_tensors(**DDPMPP))
    network.meta["state"]["_modules"]["model"].meta["state"]["_parameters"]["w"] = value
    return network
