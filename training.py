"""What the two training loops share: device and seed, learning rate, optimizer step, averaged weights."""

import torch

from config import UserError


def choose_device(name):
    """The torch device of `--device`. Raises UserError where CUDA is asked for and absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu or auto")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True  # shapes never change
    return device


def adamw(parameters, lr):
    return torch.optim.AdamW(parameters, lr, betas=(0.9, 0.999), weight_decay=0.01, fused=True)


def lr_factor(step, warmup_steps, decay, step_number):
    """Factor of the learning rate at `step` (from 0): linear rise over `warmup_steps`, linear fall over the last share `decay`."""
    rise = (step + 1) / warmup_steps if warmup_steps else 1.0
    fall = (step_number - step) / (decay * step_number) if decay else 1.0
    return min(1.0, rise, fall)


def optimizer_step(optimizer, lr, clip_grad_norm):
    """One step at learning rate `lr` on the gradients at hand, clipped to a total norm; clears them. Returns the norm before."""
    group = optimizer.param_groups[0]
    group["lr"] = lr
    norm = torch.nn.utils.clip_grad_norm_(group["params"], clip_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def accumulate(totals, values, parts):
    """Adds to the dict `totals` one part in `parts` of each 0-dimensional tensor in `values`: the means over the micro-batches."""
    for name, value in values.items():
        totals[name] = totals.get(name, 0.0) + value.detach() / parts


@torch.no_grad()
def update_ema(ema, net, decay, step):
    """ema <- decay * ema + (1 - decay) * net, after `step` (from 1) steps; early on a smaller decay forgets the start sooner."""
    decay = min(decay, step / (step + 10))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
