"""Imports folders of the package diffusers as `DiffusersUNet`, from JSON and safetensors, which cannot hold code."""

import json
import re
from pathlib import Path

import torch

from importers.state_dict import Imported, listed, match, read_safetensors
from networks.diffusers_unet import DiffusersUNet
from support.script import UserError, as_user_error

FLOW, FLOW_DEFAULTS = "FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 1000, "shift": 1.0}
SCHEDULE = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr")
# What diffusers' EMAModel adds to config.json.
OF_AVERAGE = {"decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power"}
# Names of the attention layers until diffusers 0.15, which files of that time still use.
FORMER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load_diffusers(folder):
    """The `Imported` network of a `folder` of a pipeline, or of diffusers' training script (`checkpoint-500`).

    The network is in `unet_ema/`, `unet/` or the folder itself; its scheduler in `scheduler/`, the folder or beside it.
    Raises UserError if the network is not supported, any exception for a damaged folder.
    """
    folder = Path(folder).resolve()
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").exists() else {}
    if others := [name for name in index if name not in ("unet", "scheduler") and not name.startswith("_")]:
        raise UserError(f"a pipeline with {listed(others)}; only UNet2DModel on pixels, with a scheduler, is read")
    unet = next((folder / name for name in ("unet_ema", "unet") if (folder / name).is_dir()), folder)
    weights = unet / "diffusion_pytorch_model.safetensors"
    if not weights.exists():
        has = listed(sorted(file.name for file in unet.iterdir()))
        raise UserError(f"no {weights.name}, but {has} in {unet}; a .bin can hold code and is not read")
    places = (folder / "scheduler", folder, folder.parent / "scheduler")
    scheduler = next((place for place in places if (place / "scheduler_config.json").exists()), folder)
    notes = [f"its weights are {weights}, its scheduler is in {scheduler}"]
    with torch.device("meta"):
        net = build_network(read_json(unet / "config.json"), read_json(scheduler / "scheduler_config.json"))
    tensors = {}
    for name, tensor in read_safetensors(weights).items():
        tensors[".".join(FORMER_NAMES.get(part, part) for part in name.split("."))] = tensor
    state = match(tensors, net, lambda name: name.removeprefix("unet."))
    return Imported(net, state, [], notes, licence(folder))


def read_json(path):
    with as_user_error(f"{path.name} is damaged"):
        return json.loads(path.read_text(encoding="utf-8"))


def build_network(config, scheduler):
    """The network of these contents of `config.json` and `scheduler_config.json`; an error if one is not supported."""
    if config.get("_class_name") != "UNet2DModel":
        raise UserError(f"the network is a {config.get('_class_name')!r:.60}; only UNet2DModel is supported")
    name = scheduler.get("_class_name")
    prediction = scheduler.get("prediction_type", "flow" if name == FLOW else "epsilon")
    if name == FLOW:
        if prediction not in ("flow", "flow_prediction", "v_prediction"):
            raise UserError(f"{FLOW} with prediction_type {prediction!r:.60}: not a velocity")
        if scheduler.get("use_dynamic_shifting") or scheduler.get("invert_sigmas"):
            raise UserError(f"{FLOW} with use_dynamic_shifting or invert_sigmas is not supported")
        prediction, schedule = "flow", {key: scheduler.get(key, value) for key, value in FLOW_DEFAULTS.items()}
    elif "beta_schedule" not in scheduler:
        raise UserError(f"its scheduler, {name!r:.60}, has no beta_schedule: neither a DDPM-type model nor {FLOW}")
    elif prediction == "flow":
        raise UserError(f"prediction_type 'flow' needs {FLOW}, not {name!r:.60}")
    else:
        schedule = {key: scheduler[key] for key in SCHEDULE if key in scheduler}
    unet = {name: value for name, value in config.items() if not name.startswith("_") and name not in OF_AVERAGE}
    size, in_channels, out_channels = (unet.pop(name) for name in ("sample_size", "in_channels", "out_channels"))
    if not isinstance(size, int) or in_channels not in (1, 3) or out_channels != in_channels:
        shape = f"sample_size {size}, in_channels {in_channels}, out_channels {out_channels}"
        raise UserError(f"{shape}: images must be square, with 1 or 3 channels, and no variances predicted")
    return DiffusersUNet(size, in_channels, unet.pop("num_class_embeds", None) or 0, unet, prediction, schedule)


def licence(folder):
    """The licence in the header of the model card, or None."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    header = text.removeprefix("---").partition("\n---")[0]
    stated = re.search(r"^license: *([\w.+-]+) *$", header, re.MULTILINE)
    return stated[1] if stated else None
