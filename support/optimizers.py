"""Optimizer steps: AdamW or Muon, learning rate, clipping, averaged weights, steps that are not finite."""

import torch

from support import processes
from support.options import Option, choice, count, number, positive, share
from support.script import UserError

OPTIMIZATION = [
    Option("optimizer", "adamw", choice("adamw", "muon"), "muon: inside the blocks, and AdamW for the rest"),
    Option("lr_warmup_steps", 500, number(0, whole=True), "steps over which the learning rate rises to its full value"),
    Option("lr_decay", 0.0, share, "share of the steps, at the end, over which the learning rate falls to zero"),
    Option("clip_grad_norm", 10.0, positive, "largest norm of a gradient; larger ones are scaled down to it"),
    Option("max_bad_steps", 10, count, "stop after so many steps in a row with gradients not finite (skipped)"),
]


def adamw(parameters, lr, betas=(0.9, 0.999)):
    """AdamW, fused: it can skip a step by itself (`optimizer_step`). On `meta`, to count costs, it is not."""
    parameters = list(parameters)
    return torch.optim.AdamW(parameters, lr, betas, weight_decay=0.01, fused=parameters[0].device.type != "meta")


def build_optimizer(name, network, lr):
    """The optimizer of `--optimizer` for `network`, a `Denoiser` or several in a module."""
    return Muon(network, lr) if name == "muon" else adamw(network.parameters(), lr)


BLOCKS = ("encoder", "middle", "decoder", "down_blocks", "mid_block", "up_blocks")  # of our networks and of diffusers'


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the weights inside `network`'s blocks, AdamW for all others, at one learning rate.

    Muon makes the momentum of a weight matrix orthogonal before it steps along it, so all its directions learn at the
    same pace. A convolution's weights `[out, in, 3, 3]` count as a matrix `[out, 9 in]`. Updates are scaled to the size
    of AdamW's (Liu et al. 2025, arXiv 2502.16982), whose learning rates therefore fit. The first and the last layer and
    the embeddings, where a row has a meaning of its own, and all vectors are left to AdamW. `network`: its blocks have
    a name in `BLOCKS`, and its parameters stay where they are in memory. Raises UserError if torch has no Muon, or the
    network no such blocks.
    """

    def __init__(self, network, lr):
        if not hasattr(torch.optim, "Muon"):
            mend = "update it, or use --optimizer adamw"
            raise UserError(f"--optimizer muon: it needs torch 2.9, this is {torch.__version__}; {mend}")
        super().__init__(network.parameters(), {"lr": lr, "fused": False})
        matrices = [(name.split("."), p) for name, p in network.named_parameters() if p.dim() > 1]
        self.hidden = [p for block in BLOCKS for names, p in matrices if block in names]
        if not self.hidden:
            known = ", ".join(BLOCKS)
            raise UserError(f"--optimizer muon: none of the blocks of {type(network).__name__} is called {known}")
        chosen = {id(p) for p in self.hidden}
        rest = [p for p in self.param_groups[0]["params"] if id(p) not in chosen]
        # Views: a step changes the parameters, and no weight is in memory twice.
        self.matrices = [as_matrix(p.detach(), p).requires_grad_() for p in self.hidden]
        muon = torch.optim.Muon(self.matrices, lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        self.parts = {"muon": muon, "adamw": adamw(rest, lr)}

    def step(self):
        for matrix, parameter in zip(self.matrices, self.hidden, strict=True):
            matrix.grad = None if parameter.grad is None else as_matrix(parameter.grad, parameter)
        for part in self.parts.values():
            part.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            part.step()
            part.zero_grad()

    def state_dict(self):
        """The states of both parts. Momentum has the shape of its parameter, whatever the memory layout."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        moments = state["muon"]["state"]
        state["muon"]["state"] = {
            index: {"momentum_buffer": from_matrix(moments[index]["momentum_buffer"], self.hidden[index])}
            for index in moments
        }
        return state

    def load_state_dict(self, state):
        for name, part in self.parts.items():
            load_optimizer(part, state[name])
        parameters = dict(zip(self.matrices, self.hidden, strict=True))
        for matrix, moments in self.parts["muon"].state.items():
            moments["momentum_buffer"] = as_matrix(moments["momentum_buffer"], parameters[matrix])


def as_matrix(tensor, parameter):
    """`tensor` `[out, ...]` as a matrix `[out, n]`, its columns in the order in which `parameter` is stored."""
    return (tensor if parameter.is_contiguous() else tensor.movedim(1, -1)).reshape(len(tensor), -1)


def from_matrix(matrix, parameter):
    """The inverse of `as_matrix`: a tensor of the shape of `parameter`."""
    tensor = torch.empty_like(parameter)
    as_matrix(tensor, parameter).copy_(matrix)  # a view
    return tensor


def load_optimizer(optimizer, state):
    """Loads the moments in `state`, in the memory layout of the parameters, which fused AdamW assumes."""
    if isinstance(optimizer, Muon):
        optimizer.load_state_dict(state)
        return
    # Other settings are this run's own: the state may come from another kind of device.
    groups = zip(optimizer.state_dict()["param_groups"], state["param_groups"], strict=True)
    groups = [ours | {"params": theirs["params"], "lr": float(theirs["lr"])} for ours, theirs in groups]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    for parameter, moments in optimizer.state.items() if isinstance(optimizer, torch.optim.AdamW) else ():
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = torch.empty_like(parameter).copy_(moments[name])


def lr_factor(step, warmup_steps, decay, step_number):
    """Factor of the learning rate at `step`, from 0: a rise over `warmup_steps`, a fall over the last share `decay`."""
    rise = (step + 1) / warmup_steps if warmup_steps else 1.0
    fall = (step_number - step) / (decay * step_number) if decay else 1.0
    return min(1.0, rise, fall)


def optimizer_step(optimizer, lr, max_norm):
    """One step at learning rate `lr` with gradients clipped to a total norm. Returns the norm before clipping.

    Parameters without a gradient stay as they are. Under torchrun the gradients are averaged first. If the norm is not
    finite, neither weights nor moments change; `BadSteps` counts such steps.
    """
    group = optimizer.param_groups[0]
    group["lr"] = lr
    processes.all_mean([parameter.grad for parameter in group["params"] if parameter.grad is not None])
    norm = torch.nn.utils.clip_grad_norm_(group["params"], max_norm)
    if group["fused"]:
        # As GradScaler does, this makes fused AdamW skip the step without a synchronisation.
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.step()
    elif norm.isfinite():
        optimizer.step()
    optimizer.zero_grad()
    return norm


class BadSteps:
    """Counts each optimizer's steps in a row with gradients that are not finite, on the device until `check`."""

    def __init__(self, max_bad_steps, device):
        self.max_bad_steps, self.streaks, self.longest = max_bad_steps, {}, torch.zeros((), device=device)

    def add(self, norms):
        """`norms`: a dict from each optimizer that made a step to its gradient norm."""
        for name, norm in norms.items():
            self.streaks[name] = (self.streaks.get(name, 0) + 1) * ~norm.isfinite()
            self.longest = torch.maximum(self.longest, self.streaks[name])

    def check(self, step):
        """Raises UserError after `max_bad_steps` or more bad steps in a row."""
        if self.longest >= self.max_bad_steps:
            raise UserError(
                f"step {step}: {int(self.longest)} steps in a row had gradients that are not finite and were skipped; "
                "lower the learning rate, and resume from the last checkpoint if there is one"
            )


def add_means(means, values, num_parts):
    """Adds 1 / `num_parts` of each 0-dimensional tensor in `values` to the dict `means`, over the parts of a batch."""
    for name, value in values.items():
        means[name] = means.get(name, 0.0) + value.detach() / num_parts


@torch.no_grad()
def update_ema(ema, net, decay, updates, ramp=10):
    """ema <- decay * ema + (1 - decay) * net, after the network's update number `updates` (from 1).

    The decay is at most updates / (updates + ramp): early on, the average covers about the last 1 / ramp of the
    updates.
    """
    decay = min(decay, updates / (updates + ramp))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
