"""Optimizer steps: AdamW, learning rate, clipping, averaged weights, and steps whose gradients are not finite."""

import torch

from support import parallel
from support.config import UserError


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
