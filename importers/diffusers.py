"""Imports folders of the package diffusers as `DiffusersUNet`, from JSON and safetensors, which cannot hold code."""

import json
import re
from pathlib import Path

import torch

from importers.state_dict import Imported, match, read_safetensors
from networks.diffusers_unet import DiffusersUNet

WEIGHTS = "diffusion_pytorch_model"
SCHEDULE = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
# What diffusers' EMAModel adds to config.json.
OF_AVERAGE = {"decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power"}
# Names of the attention layers until diffusers 0.15, which files of that time still use.
FORMER_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def load_diffusers(folder, num_classes=None):
    """The `Imported` network of a `folder` of a pipeline, or of diffusers' training script (`checkpoint-500`).

    The network is in `unet_ema/`, `unet/` or the folder itself; its scheduler in `scheduler/`, the folder or beside it.
    num_classes: with this number, if the network has one class more, the last is the null class of guidance: it is kept
    in the weights, but no label. Raises ValueError if the network is not supported, any exception for a damaged folder.
    """
    folder, notes = Path(folder).resolve(), []
    check_pipeline(folder)
    unet = next((folder / name for name in ("unet_ema", "unet") if (folder / name).is_dir()), folder)
    if unet.name == "unet_ema":
        notes.append("its `unet_ema` was taken, the averaged weights")
    places = [folder / "scheduler", folder, folder.parent / "scheduler"]
    scheduler = next((place for place in places if (place / "scheduler_config.json").exists()), folder)
    if scheduler == places[2]:
        notes.append(f"its scheduler is {scheduler}")
    arguments = architecture(read_json(unet / "config.json"), read_json(scheduler / "scheduler_config.json"))
    label_dim = arguments["label_dim"]
    if label_dim and num_classes == label_dim - 1:
        arguments |= {"label_dim": num_classes, "unet": arguments["unet"] | {"num_class_embeds": label_dim}}
        notes.append(f"the last of {label_dim} classes is the null class of guidance")
    elif label_dim > 1:
        notes.append(
            f"{label_dim} classes; if the last is a null class of guidance, name the others with --class_names"
        )
    files, variant = weight_files(unet)
    if variant:
        notes.append(f"its weights are those of the variant {variant}")
    with torch.device("meta"):
        net = DiffusersUNet(**arguments)
    tensors = {}
    for file in files:
        tensors |= read_safetensors(file)[0]
    former = any(".query.weight" in name for name in tensors)
    state, remaining = match(tensors, net, former_name if former else lambda name: name.removeprefix("unet."))
    if remaining:
        raise ValueError(f"tensor {next(iter(remaining))!r:.60} does not belong to UNet2DModel ({len(remaining)} such)")
    return Imported(net, state, [], notes, licence(folder))


def weight_files(folder):
    """(the safetensors files with the weights: one, or its shards; the name of their variant, such as fp16, or "")."""
    variants = {}
    for file in sorted(folder.glob(f"{WEIGHTS}*.safetensors")):
        variant = re.sub(r"-\d+-of-\d+$", "", file.stem.removeprefix(WEIGHTS)).strip(".")
        variants.setdefault(variant, []).append(file)
    if not variants:
        pickled = "; its .bin is a pickle, which can hold code and is not read" if any(folder.glob("*.bin")) else ""
        raise ValueError(f"no {WEIGHTS}.safetensors in {folder}{pickled}")
    if len(variants) > 1 and "" not in variants:
        raise ValueError(f"variants {', '.join(variants)} of the weights; rename one to {WEIGHTS}.safetensors")
    variant = min(variants)
    return variants[variant], variant


def read_json(path):
    """The dict in a JSON file. Raises ValueError if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is damaged: it must hold a JSON object")
    return content


def check_pipeline(folder):
    """Raises ValueError if the pipeline has more than a UNet and a scheduler, such as a decoder of latents."""
    if (folder / "model_index.json").exists():
        parts = {name for name in read_json(folder / "model_index.json") if not name.startswith("_")}
        if others := sorted(parts - {"unet", "scheduler"}):
            raise ValueError(
                f"a pipeline with {', '.join(others)}; only UNet2DModel on pixels, with a scheduler, is supported"
            )


def architecture(config, scheduler):
    """DiffusersUNet's arguments, from the contents of `config.json` and `scheduler_config.json`.

    Raises ValueError or KeyError if the network or its scheduler is not supported.
    """
    if config.get("_class_name") != "UNet2DModel":
        raise ValueError(f"the network is a {config.get('_class_name')!r:.60}; only UNet2DModel is supported")
    if "beta_schedule" not in scheduler:
        raise ValueError(
            f"its scheduler, {scheduler.get('_class_name')!r:.60}, has no beta_schedule: not a DDPM-type model"
        )
    if scheduler.get("rescale_betas_zero_snr"):
        raise ValueError("rescale_betas_zero_snr is not supported: its last level is pure noise, with infinite sigma")
    unet = {name: value for name, value in config.items() if not name.startswith("_") and name not in OF_AVERAGE}
    size, in_channels, out_channels = (unet.pop(name) for name in ("sample_size", "in_channels", "out_channels"))
    if not isinstance(size, int) or in_channels not in (1, 3):
        raise ValueError(
            f"sample_size {size} and in_channels {in_channels}: images must be square, with 1 or 3 channels"
        )
    if out_channels != in_channels:
        raise ValueError(
            f"out_channels {out_channels} with in_channels {in_channels}: predicted variances are not supported"
        )
    return {
        "img_resolution": size,
        "img_channels": in_channels,
        "label_dim": unet.pop("num_class_embeds", None) or 0,
        "unet": unet,
        "prediction_type": scheduler.get("prediction_type", "epsilon"),
        "schedule": {name: scheduler[name] for name in SCHEDULE} | {"trained_betas": scheduler.get("trained_betas")},
    }


def former_name(name):
    """The former name in diffusers of the tensor that our network calls `name`."""
    name = name.removeprefix("unet.")
    if ".attentions." in name:
        for now, former in FORMER_NAMES.items():
            name = name.replace(f".{now}.", f".{former}.")
    return name


def licence(folder):
    """The licence in the header of the model card, or None."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    head = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    stated = head and re.search(r"^license:[ \t]*([\w.+-]+)[ \t]*$", head[1], re.MULTILINE)
    return stated[1] if stated else None
