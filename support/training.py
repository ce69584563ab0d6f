"""Optimizer steps: AdamW or Muon, learning rate, clipping, averaged weights, and steps whose gradients are not finite."""

import torch

from support import parallel
from support.config import UserError


def adamw(parameters, lr):
    """AdamW, fused if torch's fused version can skip a step by itself (`optimizer_step`). On mps it cannot."""
    parameters = list(parameters)
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(parameters, lr, betas=(0.9, 0.999), weight_decay=0.01, fused=fused, foreach=False)


def build_optimizer(name, network, lr, heads=()):
    """The optimizer of `--optimizer` for `network`, a `Denoiser`, and for `heads`, parameters that always get AdamW."""
    return Muon(network, lr, heads) if name == "muon" else adamw([*network.parameters(), *heads], lr)


BLOCKS = ("encoder", "middle", "decoder", "down_blocks", "mid_block", "up_blocks")  # of our networks and of diffusers'


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the weights inside `network`'s blocks, AdamW for all others, at one learning rate.

    Muon makes the momentum of a weight matrix orthogonal before it steps along it, so all its directions learn at the same pace. A
    convolution's weights `[out, in, 3, 3]` count as a matrix `[out, 9 in]`. Updates are scaled to the size of AdamW's (Liu et al.
    2025, arXiv 2502.16982), whose learning rates therefore fit. The first and the last layer and the embeddings, where a row has a
    meaning of its own, all vectors, and `heads` are left to AdamW. `network`: a `Denoiser` whose blocks have a name in `BLOCKS`,
    and whose parameters stay where they are in memory. Raises UserError if torch has no Muon, or the network no such blocks.
    """

    def __init__(self, network, lr, heads=()):
        if not hasattr(torch.optim, "Muon"):
            raise UserError(
                f"--optimizer muon: it needs torch 2.9, this is {torch.__version__}; update it, or use --optimizer adamw"
            )
        super().__init__([*network.parameters(), *heads], {"lr": lr, "fused": False})
        matrices = [(name.split("."), p) for name, p in network.named_parameters() if p.dim() > 1]
        self.hidden = [p for block in BLOCKS for names, p in matrices if block in names]
        if not self.hidden:
            raise UserError(f"--optimizer muon: none of the blocks of {type(network).__name__} is called {', '.join(BLOCKS)}")
        chosen = {id(p) for p in self.hidden}
        rest = [p for p in self.param_groups[0]["params"] if id(p) not in chosen]
        self.matrices = [as_matrix(p.detach(), p).requires_grad_() for p in self.hidden]  # views: a step changes the parameters
        muon = torch.optim.Muon(self.matrices, lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        self.parts = {"muon": muon, "adamw": adamw(rest, lr)}

    def step(self):
        for matrix, parameter in zip(self.matrices, self.hidden, strict=True):
            matrix.grad = None if parameter.grad is None else as_matrix(parameter.grad, parameter)
        for part in self.parts.values():
            part.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            part.step()
            part.zero_grad()
            self.state.update(part.state)  # the moments, for whoever counts them

    def state_dict(self):
        """The states of both parts. Momentum has the shape of its parameter, whatever the memory layout on this device."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        moments = state["muon"]["state"]
        state["muon"]["state"] = {
            index: {"momentum_buffer": from_matrix(moments[index]["momentum_buffer"], self.hidden[index])} for index in moments
        }
        return state

    def load_state_dict(self, state):
        for name, part in self.parts.items():
            load_optimizer(part, state[name])
        parameters = dict(zip(self.matrices, self.hidden, strict=True))
        for matrix, moments in self.parts["muon"].state.items():
            if moments["momentum_buffer"].dim() > 2:  # older checkpoints have the matrix
                moments["momentum_buffer"] = as_matrix(moments["momentum_buffer"], parameters[matrix])


def as_matrix(tensor, parameter):
    """`tensor`, `[out, ...]`, as a matrix `[out, n]`, its columns in the order in which `parameter`, of its shape, is stored."""
    return (tensor if parameter.is_contiguous() else tensor.movedim(1, -1)).reshape(len(tensor), -1)


def from_matrix(matrix, parameter):
    """The inverse of `as_matrix`: a tensor of the shape of `parameter`."""
    tensor = torch.empty_like(parameter)
    as_matrix(tensor, parameter).copy_(matrix)  # a view
    return tensor


def load_optimizer(optimizer, state):
    """Loads `state`, with the moments in the memory layout of the parameters, which fused AdamW assumes."""
    if not isinstance(optimizer, torch.optim.AdamW):
        optimizer.load_state_dict(state)
        return
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

    Parameters without a gradient stay as they are. Under torchrun the gradients are averaged first. If the norm is not finite,
    neither weights nor moments change; `BadSteps` counts such steps.
    """
    group = optimizer.param_groups[0]
    group["lr"] = lr
    parallel.average([parameter.grad for parameter in group["params"] if parameter.grad is not None])
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
