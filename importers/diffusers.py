"""Imports folders of the package diffusers as `DiffusersUNet`, from JSON and safetensors, which cannot hold code."""

import json
import re
from pathlib import Path

import torch

from checkpoint import read_safetensors
from importers.state_dict import match
from networks.diffusers_unet import DiffusersUNet
from support.config import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"
SCHEDULE = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
# Names of the attention layers until diffusers 0.15, which files of that time still use.
FORMER_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def load_diffusers(folder):
    """(network without weights, its float32 `state_dict`, list of tensors left out, licence or None) of a `folder`.

    The folder has `unet/` and `scheduler/`; older ones hold their files directly. Raises UserError if one is missing or damaged,
    or the network is not supported.
    """
    folder = Path(folder)
    try:
        check_pipeline(folder)
        unet, scheduler = (folder / name if (folder / name).is_dir() else folder for name in ("unet", "scheduler"))
        arguments = architecture(read_json(unet / "config.json"), read_json(scheduler / "scheduler_config.json"))
        if not (unet / WEIGHTS).exists():
            pickled = "; its .bin is a pickle, which can hold code and is not read" if any(unet.glob("*.bin")) else ""
            raise ValueError(f"no {WEIGHTS} in {unet}{pickled}")
        with torch.device("meta"):
            net = DiffusersUNet(**arguments)
        tensors, _ = read_safetensors(unet / WEIGHTS)
        former = any(".query.weight" in name for name in tensors)
        state, remaining = match(tensors, net, former_name if former else lambda name: name.removeprefix("unet."))
        if remaining:
            raise ValueError(f"tensor {next(iter(remaining))!r:.60} does not belong to UNet2DModel ({len(remaining)} such)")
        return net, state, [], licence(folder)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"--source {folder}: {Path(error.filename or '').name}: {error.strerror or error}") from None
    except KeyError as error:
        raise UserError(f"--source {folder}: its configuration has no {error}") from None
    except (ArithmeticError, AssertionError, AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--source {folder}: not a UNet2DModel that diffusers can build ({reason:.160})") from None
    except ValueError as error:
        raise UserError(f"--source {folder}: {error}") from None


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
            raise ValueError(f"a pipeline with {', '.join(others)}; only UNet2DModel on pixels, with a scheduler, is supported")


def architecture(config, scheduler):
    """DiffusersUNet's arguments, from the contents of `config.json` and `scheduler_config.json`.

    Raises ValueError or KeyError if the network or its scheduler is not supported.
    """
    if config.get("_class_name") != "UNet2DModel":
        raise ValueError(f"the network is a {config.get('_class_name')!r:.60}; only UNet2DModel is supported")
    if "beta_schedule" not in scheduler:
        raise ValueError(f"its scheduler, {scheduler.get('_class_name')!r:.60}, has no beta_schedule: not a DDPM-type model")
    if scheduler.get("rescale_betas_zero_snr"):
        raise ValueError("rescale_betas_zero_snr is not supported: its last level is pure noise, with infinite sigma")
    unet = {name: value for name, value in config.items() if not name.startswith("_")}
    size, in_channels, out_channels = (unet.pop(name) for name in ("sample_size", "in_channels", "out_channels"))
    if not isinstance(size, int) or in_channels not in (1, 3):
        raise ValueError(f"sample_size {size} and in_channels {in_channels}: images must be square, with 1 or 3 channels")
    if out_channels != in_channels:
        raise ValueError(f"out_channels {out_channels} with in_channels {in_channels}: predicted variances are not supported")
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
