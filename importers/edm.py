"""Imports networks of EDM (Karras et al. 2022): NVIDIA's pickles, and files with the weights of such a network."""

import io
import math
import os
import re

import torch

from importers.safe_pickle import Record
from importers.state_dict import ADVICE, Imported, find_network, load_torch, match, read_file, read_safetensors
from networks.edm_unet import DhariwalUNet, SongUNet
from support.script import UserError

ADM = "out_conv.weight"  # a tensor that only DhariwalUNet has
MOST_BLOCKS = 64  # at each resolution; the published networks have 3 or 4
PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
LICENCE = "Attribution-NonCommercial-ShareAlike 4.0"  # at the top of the source code in NVIDIA's pickles


def load_edm(path):
    """The `Imported` network of a file: NVIDIA's pickle, or what torch.save or safetensors wrote.

    The weights may be part of a dict, under a prefix. Without NVIDIA's objects EDM's preconditioning is assumed.
    Raises UserError for a file that holds no such network, and any exception for a damaged one.
    """
    known, notes, licence, data = {}, [], None, None
    content = read_safetensors(path) if str(path).endswith(".safetensors") else read_file(path)
    if not isinstance(content, dict):
        content = {content.made_by if isinstance(content, Record) else type(content).__name__: content}
    if "model_config" in content:
        raise UserError("already a checkpoint of this project: give it to --teacher_checkpoint as it is")
    if getattr(content.get("ema"), "made_by", None) == PERSISTENT:
        tensors, known, licence = read_network(content["ema"])
        data = content.get("dataset_kwargs", {}).get("path")
    else:
        tensors, notes = find_network(content, "map_layer0.weight")
    total, size = sum(tensor.nbytes for tensor in tensors.values()), os.path.getsize(path)
    if total > size:
        raise UserError(f"its tensors take {total} bytes, but the file has {size}: they are expanded. {ADVICE}")
    with torch.device("meta"):
        net = (DhariwalUNet if ADM in tensors else SongUNet)(**architecture(tensors), **known)
    left_out = remove_constants(tensors)
    return Imported(net, match(tensors, net, lambda name: edm_name(name, net)), left_out, notes, licence, data)


# ---- NVIDIA's objects -----------------------------------------------------------------------------------------------


def read_network(record):
    """(tensors by name, dict of `dropout` and `sigma_data`, licence or None) of a recorded EDMPrecond."""
    precond = record.args[0]  # class name, attributes, and source code, which is not used
    if precond["class_name"] != "EDMPrecond":
        raise UserError(f"preconditioned by {precond['class_name']!r:.60}; only EDM's own (EDMPrecond) is supported")
    unet = precond["state"]["_modules"]["model"].args[0]
    if unet["class_name"] not in ("SongUNet", "DhariwalUNet"):
        raise UserError(f"the network is a {unet['class_name']!r:.60}; only SongUNet and DhariwalUNet are supported")
    sigma_data, dropout = precond["state"]["sigma_data"], unet["state"]["_init_kwargs"].get("dropout", 0.1)
    source = precond.get("module_src")
    licence = "CC BY-NC-SA 4.0" if isinstance(source, str) and LICENCE in source else None
    known = {"sigma_data": float(sigma_data), "dropout": float(dropout)}
    if not (0 < known["sigma_data"] < math.inf and 0 <= known["dropout"] < 1):
        raise UserError(f"sigma_data must be above 0, and dropout in [0, 1), not {known}")
    return make_tensors(named_records(unet["state"], "", seen=set())), known, licence


def named_records(module, prefix, seen):
    """Pairs (name, record), named as in `state_dict`, of the tensors of a recorded torch module and its submodules."""
    ids = {id(module[part]) for part in ("_parameters", "_buffers", "_modules")}
    if ids & seen:  # a hostile file may name one part in many modules
        raise UserError(f"the module {prefix!r:.60} occurs twice")
    seen |= ids
    for name, record in (module["_parameters"] | module["_buffers"]).items():
        if record is not None:
            yield prefix + name, record
    for name, child in module["_modules"].items():
        if child is not None:
            # torch's own containers have a state; NVIDIA's an argument
            yield from named_records(child.state or child.args[0]["state"], f"{prefix}{name!s:.40}.", seen)


def make_tensors(records):
    """The tensors of the pairs `records`, by name. The pickle holds each storage as a file of torch.save."""
    tensors, opened = {}, {}
    for name, record in records:
        if record.made_by == "torch._utils._rebuild_parameter":
            record = record.args[0]
        storage, offset, shape, stride = record.args[:4]
        data = storage.args[0]
        if id(data) not in opened:  # many tensors may name one storage; to hash a deep tuple would crash Python
            opened[id(data)] = load_torch(io.BytesIO(data))
        tensors[name] = torch._utils._rebuild_tensor(opened[id(data)], offset, shape, stride)
    return tensors


# ---- the network ----------------------------------------------------------------------------------------------------


def architecture(tensors):
    """The network's arguments, except `dropout` and `sigma_data`, from the names and shapes of EDM's tensors.

    Raises KeyError or IndexError if a tensor that every EDM network has is missing, UserError for NCSN++.
    """
    if "map_noise.freqs" in tensors:
        raise UserError('an NCSN++ (EDM\'s "ve" files), which is not supported; take DDPM++ ("vp") or ADM')
    found = [re.match(r"enc\.(\d{1,4})x\1_block0\.", name) for name in tensors]
    sides = sorted({int(match[1]) for match in found if match}, reverse=True)
    first = f"enc.{sides[0]}x{sides[0]}"
    num_blocks = sum(bool(re.fullmatch(rf"{first}_block\d+\.conv0\.weight", name)) for name in tensors)
    if num_blocks > MOST_BLOCKS:
        raise UserError(f"{num_blocks} blocks at a resolution; at most {MOST_BLOCKS} are supported")
    model_channels = tensors["map_layer0.weight"].shape[1]
    return {
        "img_resolution": sides[0],
        "img_channels": tensors[f"{first}_conv.weight"].shape[1],
        "label_dim": tensors["map_label.weight"].shape[1] if "map_label.weight" in tensors else 0,
        "model_channels": model_channels,
        "channel_mult": [tensors[f"enc.{n}x{n}_block0.conv0.weight"].shape[0] // model_channels for n in sides],
        "num_blocks": num_blocks,
        "attn_resolutions": [side for side in sides if f"enc.{side}x{side}_block0.qkv.weight" in tensors],
    }


def edm_name(name, net):
    """EDM's name of the tensor that our network `net` calls `name`."""
    fine, coarse = max(net.feature_channels), min(net.feature_channels)
    out = "out" if net.adm else f"dec.{fine}x{fine}_aux"
    theirs = {
        "conv_in": f"enc.{fine}x{fine}_conv.",
        "encoder": "enc.",
        "middle": f"dec.{coarse}x{coarse}_in",
        "decoder": "dec.",
        "norm_out": f"{out}_norm.",
        "conv_out": f"{out}_conv.",
    }
    ours, _, rest = name.partition(".")
    return theirs.get(ours, f"{ours}.") + rest


def remove_constants(tensors):
    """Removes from the dict `tensors` what our networks do without, and returns what it was.

    That is the layer for augmentation labels, which has no bias and gets zeros, and the filters of down- and
    upsampling, which are means of 2x2 pixels. Raises UserError for another filter.
    """
    left_out = []
    if tensors.pop("map_augment.weight", None) is not None:
        left_out.append("map_augment.weight (augmentation labels)")
    filters = [name for name in tensors if name.endswith(".resample_filter")]
    for name in filters:
        if not torch.equal(tensors.pop(name).float(), torch.full((1, 1, 2, 2), 0.25)):
            raise UserError(f"tensor {name} is not the mean of 2x2 pixels")
    return left_out + [f"{len(filters)} low-pass filters (constants)"] * bool(filters)
