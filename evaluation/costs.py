"""What training and sampling cost, counted on torch's `meta` device, where tensors have shapes but no numbers."""

import weakref

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from model import denoising_loss
from support.optimizers import build_optimizer


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within it and not yet freed: `now`, and the most so far, `peak`."""

    now = peak = 0

    def add(self, nbytes):
        self.now += nbytes
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for storage in storages(result) - storages((args, kwargs)):  # a result may be a view of what was given
            self.add(storage.nbytes())
            weakref.finalize(storage, self.add, -storage.nbytes())
        return result


def storages(tree):
    """The memory of the tensors in nested containers, as a set."""
    return {leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}


class AsOnCuda(TorchFunctionMode):
    """Lets `meta` work as CUDA does: fused attention and dropout, and with `bf16` autocast, which `meta` lacks."""

    CAST = ("conv2d", "conv_transpose2d", "linear", "matmul", "__matmul__", "bmm", "scaled_dot_product_attention")

    def __init__(self, bf16=False):
        super().__init__()
        self.bf16 = bf16

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if self.bf16 and getattr(function, "__name__", "") in self.CAST:
            args = [arg.bfloat16() if getattr(arg, "dtype", None) == torch.float32 else arg for arg in args]
        if function is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_efficient_attention(*args[:3], None, True)[0]
        if function is F.dropout and kwargs["training"]:
            return torch.native_dropout(*args, kwargs["p"], True)[0]
        return function(*args, **(kwargs or {}))


def count(task, bf16=False):
    """Returns (FLOPs of the products and convolutions, peak bytes of new tensors) of one call of `task` on `meta`."""
    with FlopCounterMode(display=False) as flops, LiveMemory() as memory, AsOnCuda(bf16):
        task()
    return flops.get_total_flops(), memory.peak


def fill_gradients(net):
    """Gives what is trained its gradients, which are there at the peak of memory."""
    for parameter in net.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None


def blank_batch(net, batch_size):
    """Images `[B, C, H, W]` and labels `[B]` for `net`, a `Denoiser` on `meta`."""
    shape = [net.config[name] for name in ("img_channels", "img_resolution", "img_resolution")]
    return torch.empty(batch_size, *shape, device="meta"), torch.empty(batch_size, dtype=torch.int64, device="meta")


def forward_flops(net):
    """FLOPs of one evaluation of `net`, a `Denoiser` on `meta`, per image."""
    images, labels = blank_batch(net, 1)
    return count(lambda: net(images, 1.0, labels))[0]


def teacher_costs(net, batch_size, bf16=False):
    """`count` of forward and backward pass in train_teacher.py. Its gradients are there before."""
    fill_gradients(net)
    images, labels = blank_batch(net, batch_size)
    sigma = torch.empty_like(labels, dtype=torch.float32)
    return count(lambda: denoising_loss(net(images + images, sigma, labels), images, sigma).backward(), bf16)


def turn_costs(model, batch_size, student_step=0, bf16=False):
    """`count` of making images and of both turns of a `UnifiedModel` on `meta`. Their gradients are there before."""
    fill_gradients(model)
    images, labels = blank_batch(model.feedforward_model, batch_size)
    turns = [
        lambda: model.generate_at(images, labels, student_step),
        lambda: sum(model.generator_turn(images, labels, student_step)[0].values()).backward(),
        lambda: sum(model.guidance_turn(images, labels, images, labels, student_step)[0].values()).backward(),
    ]
    return [count(turn, bf16) for turn in turns]


def optimizer_costs(name, net):
    """(FLOPs of a step, bytes of the moments) of the optimizer `name` of `net`, on `meta`. Only Muon has products."""
    optimizer = build_optimizer(name, net, lr=1.0)
    fill_gradients(net)
    flops, _ = count(optimizer.step)
    return flops, sum(moment.nbytes for state in optimizer.state.values() for moment in state.values())


def iteration_flops(args, model):
    """Mean FLOPs per image of an iteration of train_dmd2.py with options `args`, for its `UnifiedModel` on `meta`."""
    ratio, levels, flops = args.dfake_gen_update_ratio, len(model.student_sigmas), 0
    for student_step in range(levels):
        generate, generator_turn, guidance_turn = (turn[0] for turn in turn_costs(model, 1, student_step))
        flops += (generator_turn + (ratio - 1) * generate + ratio * guidance_turn) / levels
    networks = model.feedforward_model, model.fake_unets  # of several `fake_unets`, one is trained at a time
    generator, guidance = (optimizer_costs(args.optimizer, net)[0] for net in networks)
    return (flops + (generator + ratio * guidance / levels) / args.batch_size) / ratio
