"""Networks of EDM with weights by a formula, and their files as NVIDIA writes them, for tests."""

import math
import pickle
import re
import sys
import types
import zlib

import numpy as np
import pytest
import torch
from conftest import refuses

import import_teacher
from importers.edm import edm_name
from networks.edm_unet import DhariwalUNet, SongUNet

SMALL = dict(img_resolution=8, model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])
SMALL_ADM = dict(SMALL, img_resolution=16, model_channels=64, attn_resolutions=[8], label_dim=7)


def edm_network(kind=SongUNet, **changes):
    """A small network without weights, in the structure of EDM's."""
    with torch.device("meta"):
        return kind(**{**(SMALL_ADM if kind is DhariwalUNet else SMALL), **changes})


def edm_shapes(net):
    """The names and shapes of all tensors in EDM's file of this network, with those that ours does without."""
    shapes = {edm_name(name, net): list(tensor.shape) for name, tensor in net.state_dict().items()}
    resampled = [name.removesuffix("conv0.weight") for name in shapes if re.search(r"_(down|up)\.conv0\.w", name)]
    shapes |= {f"{block}{layer}.resample_filter": [1, 1, 2, 2] for block in resampled for layer in ("conv0", "skip")}
    if isinstance(net, SongUNet):
        shapes["map_augment.weight"] = [net.map_layer0.in_features, 9]
    return shapes


def formula(name, shape):
    """Numbers that depend on a tensor's name alone, of a size that keeps activations near 1."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    waves = (index**2 * 0.6180339887 + zlib.crc32(name.encode()) % 1000).cos().reshape(shape) * 2**0.5
    if len(shape) == 1:
        return (0.1 * waves + ("norm" in name and name.endswith("weight"))).float()
    return waves.float() if "." not in name else (waves / math.prod(shape[1:]) ** 0.5).float()


def edm_tensors(kind=SongUNet, **changes):
    """The formula's weights for a small network, by EDM's names; with the constant filters that its files hold."""
    shapes = edm_shapes(edm_network(kind, **changes))
    return {n: torch.full(shape, 0.25) if "filter" in n else formula(n, shape) for n, shape in shapes.items()}


# ---- NVIDIA's file --------------------------------------------------------------------------------------------------


class Persistent:
    """An object as NVIDIA's `torch_utils.persistence` writes it: its class's name and source, and its attributes."""

    def __init__(self, class_name, module_src="", **state):
        self.meta = {"type": "class", "version": 6, "module_src": module_src, "class_name": class_name, "state": state}

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


def module(class_name, tensors, **state):
    """`tensors` by dotted names as nested modules; `enc` and `dec` are torch's, the others NVIDIA's classes.

    What is no tensor is pickled as it is.
    """
    buffers = {name: tensor for name, tensor in tensors.items() if name == "resample_filter"}
    own = {name: tensor for name, tensor in tensors.items() if "." not in name and name not in buffers}
    children = {}
    for name in dict.fromkeys(name.partition(".")[0] for name in tensors if "." in name):
        inner = {key.partition(".")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        children[name] = module("Layer", inner, skip_scale=np.sqrt(0.5))
        if name in ("enc", "dec"):
            container = torch.nn.ModuleDict()
            container._modules = children[name].meta["state"]["_modules"]
            children[name] = container
    parameters = {name: torch.nn.Parameter(t, False) if torch.is_tensor(t) else t for name, t in own.items()}
    parts = dict(_parameters={**parameters, "none": None}, _buffers={**buffers, "none": None}, _modules=children)
    return Persistent(class_name, **parts, training=False, **state)


def precond(tensors, name="EDMPrecond", unet="SongUNet", source=""):
    """EDM's network with these weights, as the entry `ema` of its file has it."""
    model = module(unet, tensors, _init_kwargs={"dropout": 0.11})
    return Persistent(name, source, _modules={"model": model}, sigma_data=0.5, use_fp16=False)


def write_pickle(path, content):
    """Pickles `content` while stand-ins for NVIDIA's two modules are in place."""
    persistence, dnnlib = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
    exec("def _reconstruct_persistent_obj(meta): raise AssertionError", persistence.__dict__)
    dnnlib.EasyDict = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})
    stand_ins = {"torch_utils": persistence, "torch_utils.persistence": persistence}
    stand_ins |= {"dnnlib": dnnlib, "dnnlib.util": dnnlib}
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in stand_ins.items():
            patch.setitem(sys.modules, name, stand_in)
        content = {**content, "dataset_kwargs": dnnlib.EasyDict(path="cifar10.zip", use_labels=True)}
        path.write_bytes(pickle.dumps(content, protocol=4))
    return path


def write_edm(path, kind=SongUNet, source="", **changes):
    """A small pickle of the published structure."""
    network = precond(edm_tensors(kind, **changes), unet=kind.__name__, source=source)
    return write_pickle(path, {"ema": network, "loss_fn": Persistent("EDMLoss", P_mean=-1.2)})


def imported(source, folder, *arguments):
    """The checkpoint that import_teacher.py makes of `source` in `folder`/imported, by its own main."""
    output = folder / "imported" / f"{source.name}.pt"
    import_teacher.main(["--source", str(source), "--output", str(output), *arguments])
    return output


def assert_import_refused(source, folder, message):
    refuses(message, "import_teacher.py", source=source, output=folder / "imported" / "x.pt")
    assert not (folder / "imported").exists()
