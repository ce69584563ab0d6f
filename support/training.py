"""What the two training loops share: device and precision, learning rate, optimizer step, averaged weights."""

import ctypes
import os
import platform
import sys
from contextlib import nullcontext

import torch

from support import parallel
from support.config import UserError


def choose_device(args):
    """The torch device of `--device`, set up for `--precision`; under torchrun one GPU per process. Joins torchrun's processes.

    A dry run gets the `meta` device, whatever `--device` is. Raises UserError if the device is not available.
    """
    if getattr(args, "dry_run", False):
        return torch.device("meta")
    name, processes = args.device, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda:") and processes > 1:
        raise UserError(f"--device {name}: {processes} processes need a GPU each; use --device cuda or auto")
    if name == "cuda" and processes > max(1, torch.cuda.device_count()):
        raise UserError(f"{processes} processes but only {torch.cuda.device_count()} GPUs; start fewer, or use --device cpu")
    device = torch.device(f"cuda:{parallel.LOCAL_RANK}" if name == "cuda" else name)
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise UserError(
            f"--device {args.device}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu or auto"
        )
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("--device mps: torch finds no Apple GPU on this machine; use --device cpu or auto")
        if args.precision == "bf16" or args.compile or processes > 1:
            raise UserError("--device mps supports one process in fp32, without --precision bf16, --compile and torchrun")
        print("--device mps: untested; if it fails, please report it and use --device cpu")
    keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
    torch.backends.cudnn.benchmark = True  # shapes never change
    if device.type == "cuda":
        torch.cuda.set_device(device)
    parallel.start(device)
    return device


def keep_freed_memory():
    """Makes glibc keep the memory of freed tensors for new ones until the process ends. Does nothing without glibc.

    By default glibc returns large blocks to the kernel, which must clear each page when it hands it out again: at every step.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3  # as in malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)  # the most that earlier versions accept


def autocast(args, device):
    """The context in which networks run: bfloat16 with `--precision bf16`.

    It applies to convolutions and matrix products; weights, preconditioning and losses stay in float32. Its cache of cast weights
    is off: it would reuse weights that were cast without gradients in a pass that needs gradients. On `meta`, `DryRun` casts.
    """
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16", cache_enabled=False)


def compile_networks(args, *networks):
    """Compiles the networks in place with torch.compile, if `--compile` is on and this machine has a compiler."""
    if not args.compile:
        return
    try:
        torch.compile(torch.sin)(next(networks[0].parameters()).detach())
    except Exception as error:  # compilers may raise anything
        print(f"--compile: not available here, going on without ({' '.join(str(error).split())[:120]})")
        return
    torch._dynamo.config.cache_size_limit = 64  # one for each network, batch size and kind of pass
    for network in networks:
        # One compilation per batch size: with dynamic sizes, Inductor skips its optimisation of the layout of convolutions.
        network.compile(dynamic=False)
        network.encode = torch.compile(network.encode, dynamic=False)


def adamw(parameters, lr):
    """AdamW, fused if torch's fused version can skip a step by itself (`optimizer_step`). On mps it cannot."""
    parameters = list(parameters)
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(parameters, lr, betas=(0.9, 0.999), weight_decay=0.01, fused=fused, foreach=False)


def load_optimizer(optimizer, state):
    """Loads `state`, with the moments in the memory layout of the parameters, which fused AdamW assumes."""
    fused = optimizer.defaults["fused"]  # the state may come from another kind of device
    optimizer.load_state_dict({**state, "param_groups": [group | {"fused": fused} for group in state["param_groups"]]})
    for parameter, moments in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = torch.empty_like(parameter).copy_(moments[name])


def lr_factor(step, warmup_steps, decay, step_number):
    """Factor of the learning rate at `step` (from 0): linear rise over `warmup_steps`, linear fall over the last share `decay`."""
    rise = (step + 1) / warmup_steps if warmup_steps else 1.0
    fall = (step_number - step) / (decay * step_number) if decay else 1.0
    return min(1.0, rise, fall)


def optimizer_step(optimizer, lr, clip_grad_norm):
    """One step at learning rate `lr` with gradients clipped to a total norm; clears them. Returns the norm before clipping.

    Under torchrun the gradients are averaged first. If the norm is not finite, neither weights nor moments change; `BadSteps`
    counts such steps.
    """
    group = optimizer.param_groups[0]
    group["lr"] = lr
    parallel.average([parameter.grad for parameter in group["params"]])
    norm = torch.nn.utils.clip_grad_norm_(group["params"], clip_grad_norm)
    if group["fused"]:
        # As GradScaler does, this makes fused AdamW skip the step without a synchronisation.
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.step()
    elif norm.is_meta or norm.isfinite():
        optimizer.step()
    optimizer.zero_grad()
    return norm


class BadSteps:
    """Counts each optimizer's steps in a row with gradients that are not finite. The counts stay on the device until `check`."""

    def __init__(self, most, device):
        self.most, self.streaks, self.longest = most, {}, torch.zeros((), device=device)

    def add(self, norms):
        """`norms`: a dict from each optimizer that made a step to its gradient norm."""
        for name, norm in norms.items():
            self.streaks[name] = (self.streaks.get(name, 0) + 1) * ~norm.isfinite()
            self.longest = torch.maximum(self.longest, self.streaks[name])

    def check(self, step, folder, sigmas):
        """Raises UserError after `most` or more bad steps in a row; `sigmas` is the range of noise levels, as text."""
        if self.longest >= self.most:
            raise UserError(
                f"step {step}: {int(self.longest)} steps in a row had gradients that are not finite and were skipped "
                f"(sigma {sigmas}); resume from the last checkpoint in {folder} with a lower learning rate"
            )


def accumulate(totals, values, parts):
    """Adds 1 / `parts` of each 0-dimensional tensor in `values` to the dict `totals`, for means over the micro-batches."""
    for name, value in values.items():
        totals[name] = totals.get(name, 0.0) + value.detach() / parts


@torch.no_grad()
def update_ema(ema, net, decay, updates, ramp=10):
    """ema <- decay * ema + (1 - decay) * net, after the network's update number `updates` (from 1).

    The decay is at most updates / (updates + ramp): early on, the average covers about the last 1 / ramp of the updates.
    """
    decay = min(decay, updates / (updates + ramp))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
