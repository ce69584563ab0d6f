"""Imports NVIDIA's pretrained EDM networks (Karras et al. 2022) without running code from their files."""

import io
import pickle
import re
import zipfile
import zlib
from pathlib import Path

import torch

from checkpoint import is_safetensors, read_safetensors
from importers.safe_pickle import read
from importers.state_dict import match
from networks.dhariwal_unet import DhariwalUNet
from networks.song_unet import SongUNet, lowpass
from support.config import UserError

NETWORKS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}  # by EDM's names
NETWORK_NAMES = "SongUNet (DDPM++, NCSN++) and DhariwalUNet (ADM)"
LICENCE = "Attribution-NonCommercial-ShareAlike 4.0"  # at the top of the source code in NVIDIA's pickles
OURS = "already a checkpoint of this project: give it to --teacher_checkpoint as it is"


def load_edm(path):
    """(network without weights, its float32 `state_dict`, list of what was left out, licence or None) of a file.

    Raises UserError if it is missing, damaged, hostile or not such a network.
    """
    tensors, known, licence = read_source(path)
    try:
        with torch.device("meta"):
            net = network_of(tensors)(**architecture(tensors), **known)
        return net, *convert(tensors, net), licence
    except ValueError as error:
        raise UserError(f"--source {path}: {error}") from None
    except (IndexError, ZeroDivisionError, RuntimeError):  # shapes that no network has
        raise UserError(f"--source {path}: not an EDM network") from None


# ---- the file -----------------------------------------------------------------------------------------------------------


def read_source(path):
    """(dict of the tensors by EDM's names, dict of `dropout` and `sigma_data` if known, licence or None) of the file at `path`.

    The file is NVIDIA's pickle, whose entry `ema` is used, or a `state_dict` written by torch.save or safetensors, for which
    EDM's preconditioning is assumed. No code in it is run. Raises UserError if it is missing, damaged, hostile or not such a
    network.
    """
    try:
        if is_safetensors(path):
            tensors, metadata = read_safetensors(path)
            if "minimal_dmd2" in metadata:
                raise ValueError(OURS)
            return without_prefix(tensors), {}, metadata.get("license")
        data = Path(path).read_bytes()
        if data.startswith(b"PK"):  # torch.save writes a ZIP
            with zipfile.ZipFile(io.BytesIO(data)) as archive:  # torch writes checksums but does not check them
                damaged = archive.testzip()
            content = None if damaged else load_tensors(data)
            if isinstance(content, dict) and "model_config" in content:
                raise ValueError(OURS)
            if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
                raise ValueError("damaged, or not a state_dict: it must hold a network's tensors by name, and nothing else")
            return without_prefix(content), {}, None
        content = read(data)
        if not isinstance(content, dict) or "ema" not in content:
            raise ValueError("not an EDM network: no entry `ema`")
        return read_network(content["ema"])
    except OSError as error:
        raise UserError(f"--source {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"--source {path}: {str(error).splitlines()[0]}") from None
    except (ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, zipfile.BadZipFile, zlib.error):
        raise UserError(f"--source {path}: damaged, or not an EDM network") from None


def without_prefix(tensors):
    """The tensors without the prefix `model.`: EDM's preconditioned network has the network as its attribute `model`."""
    return {str(name).removeprefix("model."): tensor for name, tensor in tensors.items()}


def read_network(ema):
    """The result of `read_source` for the recorded EDMPrecond object `ema`. Raises ValueError if it is another object."""
    name, precond = persistent(ema)
    if name != "EDMPrecond":
        raise ValueError(f"preconditioned by {name!r:.60}; only EDM's own (EDMPrecond) is supported")
    name, unet = persistent(precond["_modules"]["model"])
    if name not in NETWORKS:
        raise ValueError(f"the network is a {name!r:.60}; only {NETWORK_NAMES} are supported")
    known = {"sigma_data": float(precond["sigma_data"])}
    if "dropout" in unet["_init_kwargs"]:
        known["dropout"] = float(unet["_init_kwargs"]["dropout"])
    source = ema.args[0].get("module_src")
    licence = "CC BY-NC-SA 4.0" if isinstance(source, str) and LICENCE in source else None
    return dict(named_tensors(unet, "", seen=set())), known, licence


def persistent(record):
    """(class name, attributes) of an object that `torch_utils.persistence` wrote. The source code stored with them is not used."""
    meta = record.args[0]
    if not isinstance(meta["class_name"], str):
        raise ValueError("not an EDM network: a class whose name is no text")
    return meta["class_name"], meta["state"]


def named_tensors(module, prefix, seen):
    """Pairs (name, tensor), named as in `state_dict`, of a recorded torch module with these attributes and of its submodules."""
    if id(module) in seen:
        raise ValueError(f"the module {prefix!r:.60} occurs twice")
    seen.add(id(module))
    for name, value in (module["_parameters"] | module["_buffers"]).items():
        if value is not None:
            yield prefix + name, rebuild(value)
    for name, child in module["_modules"].items():
        if child is not None:
            attributes = child.state or persistent(child)[1]  # torch's own containers have a state; NVIDIA's an argument
            yield from named_tensors(attributes, f"{prefix}{name}.", seen)


def load_tensors(data):
    """The content of `data`, bytes from torch.save. Raises ValueError if it is more than tensors and plain containers."""
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError("it holds more than tensors, or is damaged; nothing in it was run") from None
    except Exception:  # a damaged file can make torch's reader raise anything
        raise ValueError("damaged") from None


def rebuild(record):
    """The tensor that a pickle describes by calls of `torch._utils`. Raises ValueError if it exceeds its storage."""
    if record.made_by.endswith("_rebuild_parameter"):
        record = record.args[0]
    storage, offset, size, stride = record.args[:4]
    stored = load_tensors(storage.args[0])
    flat = torch.empty(0, dtype=stored.dtype).set_(stored._untyped_storage)
    if torch.Size(size).numel() > flat.numel():
        raise ValueError("a tensor is larger than its storage")
    return flat.as_strided(size, stride, offset)


# ---- the network --------------------------------------------------------------------------------------------------------


def network_of(tensors):
    """The class of the network whose tensors have these names."""
    return DhariwalUNet if "out_conv.weight" in tensors else SongUNet


def architecture(tensors):
    """The network's arguments, except `dropout` and `sigma_data`, from the names and shapes of EDM's tensors.

    Raises ValueError if a tensor that every EDM network has is missing, or if the network is not supported.
    """

    def shape(name):
        if name not in tensors:
            raise ValueError(f"not an EDM network ({NETWORK_NAMES}): no tensor {name}")
        return tensors[name].shape

    if "time_embedding.linear_1.bias" in tensors:
        raise ValueError("only weights of diffusers; give their folder, where config.json describes the network")
    for form in ("aux_skip", "aux_up"):
        if any(f"_{form}." in name for name in tensors):
            raise ValueError(f"a SongUNet with layers {form}; only those of DDPM++ and NCSN++ are supported")
    sides = sorted({int(match[1]) for name in tensors if (match := re.match(r"enc\.(\d{1,4})x\1_block0\.", name))}, reverse=True)
    first = f"enc.{sides[0]}x{sides[0]}" if sides else "enc.32x32"
    width, img_channels = shape(f"{first}_conv.weight")[:2]
    emb_channels, noise_channels = shape("map_layer0.weight")
    adm = network_of(tensors) is DhariwalUNet
    model_channels = noise_channels if adm else width
    config = {
        "img_resolution": sides[0],
        "img_channels": img_channels,
        "label_dim": tensors["map_label.weight"].shape[1] if "map_label.weight" in tensors else 0,
        "model_channels": model_channels,
        "channel_mult": [shape(f"enc.{side}x{side}_block0.conv0.weight")[0] // model_channels for side in sides],
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
    finest, coarsest = (f"{side}x{side}" for side in (sides[0], sides[-1]))

    def block(sides, level, index, resampling):
        """EDM's numbers skip the down- or upsampling block, which comes first at every level but the first."""
        index, side = int(index) - (level != "0"), sides[int(level)]
        return f"{side}x{side}_{resampling}" if index < 0 else f"{side}x{side}_block{index}"

    match name.replace("attention.norm", "norm2").replace("attention.", "").split("."):
        case ["freqs"]:
            path = ["map_noise", "freqs"]
        case ["embed_class" | "embed_hidden" | "embed_out" as layer, leaf]:
            path = [{"embed_class": "map_label", "embed_hidden": "map_layer0", "embed_out": "map_layer1"}[layer], leaf]
        case ["conv_in", leaf]:
            path = ["enc", f"{finest}_conv", leaf]
        case ["encoder", level, index, *leaf]:
            path = ["enc", block(sides, level, index, "down"), *leaf]
        case ["image_down", index, leaf]:
            path = ["enc", "{0}x{0}_aux_residual".format(sides[int(index) + 1]), leaf]
        case ["middle", index, *leaf]:
            path = ["dec", f"{coarsest}_in{index}", *leaf]
        case ["decoder", level, index, *leaf]:
            path = ["dec", block(sides[::-1], level, index, "up"), *leaf]
        case ["norm_out" | "conv_out" as layer, leaf] if config["network"] == "DhariwalUNet":
            path = [{"norm_out": "out_norm", "conv_out": "out_conv"}[layer], leaf]
        case ["norm_out" | "conv_out" as layer, leaf]:
            path = ["dec", f"{finest}_aux_{layer.removesuffix('_out')}", leaf]
    return ".".join(path)


def convert(tensors, net):
    """(the float32 `state_dict` of `net`, descriptions of what was left out) from tensors by EDM's names, each used once.

    Left out are the layer for augmentation labels, which has no bias and gets zeros, and the low-pass filters, which are
    constants of `net` and only compared. Raises ValueError if any other tensor is left over, and as `match` does.
    """
    state, remaining = match(tensors, net, lambda name: edm_name(name, net.config))
    left_out = []
    if "map_augment.weight" in remaining:
        left_out.append(f"map_augment.weight {list(remaining.pop('map_augment.weight').shape)} (augmentation labels)")
    filters = [name for name in remaining if name.endswith(".resample_filter")]
    taps = net.config.get("resample_filter", [1, 1])
    for name in filters:
        if not torch.equal(remaining.pop(name).float(), lowpass(taps)):
            raise ValueError(f"tensor {name} is not the low-pass of {taps}")
    if filters:
        left_out.append(f"{len(filters)} low-pass filters (constants)")
    if remaining:
        raise ValueError(f"tensor {next(iter(remaining))!r:.60} does not belong to {net.config['network']} ({len(remaining)} such)")
    return state, left_out
