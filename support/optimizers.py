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


def orthogonal(matrix):
    """About U V^T for a matrix U S V^T: five Newton-Schulz steps in bfloat16, with Muon's coefficients."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    X = wide.bfloat16()
    X = X / X.norm().clamp(min=1e-7)
    for _ in range(5):
        A = X @ X.T
        B = torch.addmm(A, A, A, beta=-4.7750, alpha=2.0315)
        X = torch.addmm(X, B, X, beta=3.4445)
    return X if wide is matrix else X.T


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for the weights inside `network`'s blocks, AdamW for all others, at one learning rate.

    Muon makes the momentum of a weight matrix orthogonal before it steps along it, so all its directions learn at the
    same pace. A convolution's weights `[out, in, 3, 3]` count as a matrix `[out, 9 in]`. Updates are scaled to the size
    of AdamW's (Liu et al. 2025, arXiv 2502.16982), whose learning rates therefore fit. The first and the last layer and
    the embeddings, where a row has a meaning of its own, and all vectors are left to AdamW. `network`: its blocks have
    a name in `BLOCKS`. Raises UserError if it has no such blocks.
    """

    def __init__(self, network, lr):
        parameters = list(network.parameters())
        super().__init__(parameters, lr, weight_decay=0.01, fused=parameters[0].device.type != "meta")
        self.hidden = [p for name, p in network.named_parameters() if p.dim() > 1 and {*BLOCKS} & {*name.split(".")}]
        if not self.hidden:
            kind = type(network).__name__
            raise UserError(f"--optimizer muon: none of the blocks of {kind} is called {', '.join(BLOCKS)}")

    @torch.no_grad()
    def step(self):
        if getattr(self, "found_inf", False):  # waits for the device, as AdamW alone need not
            return
        lr, decay = self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]
        for p in self.hidden:
            if p.grad is not None:
                if not self.state[p]:  # AdamW loads no state without a step
                    self.state[p].update(step=torch.zeros(()), momentum=torch.zeros_like(p))
                momentum = self.state[p]["momentum"].lerp_(p.grad, 0.05)
                update = orthogonal(p.grad.lerp(momentum, 0.95).flatten(1))  # Nesterov's
                p.mul_(1 - lr * decay).add_(update.reshape(p.shape), alpha=-0.2 * lr * max(update.shape) ** 0.5)
                p.grad = None  # AdamW steps only what has a gradient
        super().step()


def load_optimizer(optimizer, state):
    """Loads the moments in `state`, in the memory layout of the parameters, which fused AdamW assumes."""
    # The settings are this run's own: the state may come from another kind of device.
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state["state"]})
    by_muon = set(getattr(optimizer, "hidden", ()))
    for parameter, moments in optimizer.state.items():
        for name in ("momentum",) if parameter in by_muon else ("exp_avg", "exp_avg_sq"):
            moments[name] = torch.empty_like(parameter).copy_(moments[name])


def lr_factor(step, warmup_steps, decay, step_number):
    """Factor of the learning rate at `step`, from 0: a rise over `warmup_steps`, a fall over the last share `decay`."""
    rise = (step + 1) / warmup_steps if warmup_steps else 1.0
    fall = (step_number - step) / (decay * step_number) if decay else 1.0
    return min(1.0, rise, fall)


def optimizer_step(optimizer, lr, max_norm):
    """One step at learning rate `lr`, with gradients clipped to a total norm, then cleared. Returns the norm before.

    Parameters without a gradient stay as they are. Under torchrun the gradients are averaged first. If the norm is not
    finite, a fused optimizer changes neither weights nor moments; `optimizer.bad_steps` is how many such steps in a row
    there are now, and were at most, counted on the device.
    """
    group = optimizer.param_groups[0]
    group["lr"] = lr
    processes.all_mean([parameter.grad for parameter in group["params"] if parameter.grad is not None])
    norm = torch.nn.utils.clip_grad_norm_(group["params"], max_norm)
    bad = ~norm.isfinite()
    in_a_row, at_most = getattr(optimizer, "bad_steps", (0, torch.zeros_like(norm)))
    in_a_row = (in_a_row + 1) * bad
    optimizer.bad_steps = in_a_row, torch.maximum(at_most, in_a_row)
    optimizer.found_inf = bad.float()  # as GradScaler does: a fused optimizer skips the step, without a synchronisation
    optimizer.step()
    optimizer.zero_grad()
    return norm


@torch.no_grad()
def update_ema(ema, net, decay, updates, ramp=10):
    """ema <- decay * ema + (1 - decay) * net, after the network's update number `updates` (from 1).

    The decay is at most updates / (updates + ramp): early on, the average covers about the last 1 / ramp of them.
    """
    decay = min(decay, updates / (updates + ramp))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
