"""Imports networks of EDM (Karras et al. 2022): NVIDIA's pickles, and files with the weights of such a network."""

import math
import os
import re

import torch

from importers.safe_pickle import Record
from importers.state_dict import Imported, find_network, make_tensors, match, read_file, read_safetensors
from networks.dhariwal_unet import DhariwalUNet
from networks.song_unet import SongUNet
from networks.unet import lowpass

NETWORKS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}  # by EDM's names
ADM = "out_conv.weight"  # a tensor that only DhariwalUNet has
PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
LICENCE = "Attribution-NonCommercial-ShareAlike 4.0"  # at the top of the source code in NVIDIA's pickles


def load_edm(path):
    """The `Imported` network of a file: NVIDIA's pickle, or what torch.save or safetensors wrote.

    The weights may be part of a dict, under a prefix. Without NVIDIA's objects EDM's preconditioning is assumed.
    Raises ValueError for a file that holds no such network, and any exception for a damaged one.
    """
    known, notes, licence, data = {}, [], None, None
    if str(path).endswith(".safetensors"):
        content, metadata = read_safetensors(path)
        licence = metadata.get("license")
        tensors, notes = find_network(content, "map_layer0.weight")
    else:
        content, storage = read_file(path)
        if not isinstance(content, dict):
            content = {content.made_by if isinstance(content, Record) else type(content).__name__: content}
        if "model_config" in content:
            raise ValueError("already a checkpoint of this project: give it to --teacher_checkpoint as it is")
        if getattr(content.get("ema"), "made_by", None) == PERSISTENT:
            tensors, known, licence = read_network(content["ema"])
            data = content.get("dataset_kwargs", {}).get("path")
        else:
            tensors, notes = find_network(content, "map_layer0.weight")
        tensors = make_tensors(tensors, storage, os.path.getsize(path))
    with torch.device("meta"):
        net = (DhariwalUNet if ADM in tensors else SongUNet)(**architecture(tensors), **known)
    left_out = remove_constants(tensors, net)
    return Imported(net, match(tensors, net, lambda name: edm_name(name, net.config)), left_out, notes, licence, data)


# ---- NVIDIA's objects -----------------------------------------------------------------------------------------------


def read_network(record):
    """(records of the tensors, dict of `dropout` and `sigma_data`, licence or None) of a recorded EDMPrecond."""
    name, precond = persistent(record)
    if name != "EDMPrecond":
        raise ValueError(f"preconditioned by {name!r:.60}; only EDM's own (EDMPrecond) is supported")
    name, unet = persistent(precond["_modules"]["model"])
    if name not in NETWORKS:
        raise ValueError(
            f"the network is a {name!r:.60}; only SongUNet (DDPM++, NCSN++) and DhariwalUNet (ADM) are supported"
        )
    known = {"sigma_data": float(precond["sigma_data"]), "dropout": float(unet["_init_kwargs"].get("dropout", 0.1))}
    if not (0 < known["sigma_data"] < math.inf and 0 <= known["dropout"] < 1):
        raise ValueError(f"sigma_data must be above 0, and dropout in [0, 1), not {known}")
    source = record.args[0].get("module_src")
    licence = "CC BY-NC-SA 4.0" if isinstance(source, str) and LICENCE in source else None
    return dict(named_tensors(unet, "", seen=set())), known, licence


def persistent(record):
    """(class name, attributes) of an object of `torch_utils.persistence`. The source code with it is not used."""
    return record.args[0]["class_name"], record.args[0]["state"]


def named_tensors(module, prefix, seen):
    """Pairs (name, record), named as in `state_dict`, of a recorded torch module and its submodules."""
    if id(module) in seen:
        raise ValueError(f"the module {prefix!r:.60} occurs twice")
    seen.add(id(module))
    for name, value in (module["_parameters"] | module["_buffers"]).items():
        if value is not None:
            yield prefix + name, value
    for name, child in module["_modules"].items():
        if child is not None:
            # torch's own containers have a state; NVIDIA's an argument
            yield from named_tensors(child.state or persistent(child)[1], f"{prefix}{name}.", seen)


# ---- the network ----------------------------------------------------------------------------------------------------


def architecture(tensors):
    """The network's arguments, except `dropout` and `sigma_data`, from the names and shapes of EDM's tensors.

    Raises KeyError or IndexError if a tensor that every EDM network has is missing.
    """
    found = [re.match(r"enc\.(\d{1,4})x\1_block0\.", name) for name in tensors]
    sides = sorted({int(match[1]) for match in found if match}, reverse=True)
    first = f"enc.{sides[0]}x{sides[0]}"
    width, img_channels = (tensors[f"{first}_conv.weight"].shape[axis] for axis in (0, 1))
    emb_channels, noise_channels = (tensors["map_layer0.weight"].shape[axis] for axis in (0, 1))
    adm = ADM in tensors
    model_channels = noise_channels if adm else width
    config = {
        "img_resolution": sides[0],
        "img_channels": img_channels,
        "label_dim": tensors["map_label.weight"].shape[1] if "map_label.weight" in tensors else 0,
        "model_channels": model_channels,
        "channel_mult": [tensors[f"enc.{n}x{n}_block0.conv0.weight"].shape[0] // model_channels for n in sides],
        "channel_mult_emb": emb_channels // model_channels,
        "num_blocks": sum(bool(re.fullmatch(rf"{first}_block\d+\.conv0\.weight", name)) for name in tensors),
        "attn_resolutions": [side for side in sides if f"enc.{side}x{side}_block0.qkv.weight" in tensors],
    }
    if adm:
        return config
    kernels = [tensor for name, tensor in tensors.items() if name.endswith(".resample_filter")]
    residual = any("_aux_residual." in name for name in tensors)
    return config | {
        "embedding_type": "fourier" if "map_noise.freqs" in tensors else "positional",
        "channel_mult_noise": noise_channels // model_channels,
        "encoder_type": "residual" if residual else "standard",
        "resample_filter": [1, 3, 3, 1] if (kernels[0].shape[-1] == 4 if kernels else residual) else [1, 1],
    }


def edm_name(name, config):
    """EDM's name of the tensor that our network with this `config` calls `name`."""
    sides = [config["img_resolution"] >> level for level in range(len(config["channel_mult"]))]
    sides = [f"{side}x{side}" for side in sides]
    out = "out_{}" if config["network"] == "DhariwalUNet" else f"dec.{sides[0]}_aux_{{}}"
    layers = {
        "freqs": "map_noise.freqs",
        "embed_class": "map_label",
        "embed_hidden": "map_layer0",
        "embed_out": "map_layer1",
        "conv_in": f"enc.{sides[0]}_conv",
        "norm_out": out.format("norm"),
        "conv_out": out.format("conv"),
    }

    def block(level, index, resampling):
        """EDM's numbers skip the down- or upsampling block, which comes first at every level but the first."""
        index = int(index) - (level != "0")
        return resampling if index < 0 else f"block{index}"

    match name.replace("attention.norm", "norm2").replace("attention.", "").split("."):
        case ["encoder", level, index, *leaf]:
            layer = f"enc.{sides[int(level)]}_{block(level, index, 'down')}"
        case ["image_down", level, *leaf]:
            layer = f"enc.{sides[int(level) + 1]}_aux_residual"
        case ["middle", index, *leaf]:
            layer = f"dec.{sides[-1]}_in{index}"
        case ["decoder", level, index, *leaf]:
            layer = f"dec.{sides[-1 - int(level)]}_{block(level, index, 'up')}"
        case [ours, *leaf]:
            layer = layers[ours]
    return ".".join([layer, *leaf])


def remove_constants(tensors, net):
    """Removes from the dict `tensors` what `net` does without, and returns what it was.

    That is the layer for augmentation labels, which has no bias and gets zeros, and the low-pass filters, which are
    constants of `net`. Raises ValueError for another filter.
    """
    left_out = []
    if tensors.pop("map_augment.weight", None) is not None:
        left_out.append("map_augment.weight (augmentation labels)")
    filters = [name for name in tensors if name.endswith(".resample_filter")]
    taps = net.config.get("resample_filter", [1, 1])
    for name in filters:
        if not torch.equal(tensors.pop(name).float(), lowpass(taps)):
            raise ValueError(f"tensor {name} is not the low-pass of {taps}")
    return left_out + [f"{len(filters)} low-pass filters (constants)"] * bool(filters)
