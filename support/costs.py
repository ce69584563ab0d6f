"""What a call costs: arithmetic, memory, and the time of each operator."""

import weakref
from collections import defaultdict
from functools import partial
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from model import memory_layout


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of tensors that are created within it and not yet freed: `now`, and the maximum so far, `peak`.

    tensors: existing ones that also count; parameters: `gradients` is the bytes of their gradients at the peak;
    device_type: count only the tensors on this kind of device
    """

    def __init__(self, tensors=(), parameters=(), device_type=None):
        super().__init__()
        self.parameters, self.device_type = list(parameters), device_type
        self.live, self.now, self.peak, self.gradients = set(), 0, 0, 0
        self.add(self.storages(tensors))

    def storages(self, tree):
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
        tensors = [tensor for tensor in tensors if self.device_type in (None, tensor.device.type)]
        return {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}

    def add(self, storages):
        for key, storage in storages.items():
            self.live.add(key)
            self.now += storage.nbytes()
            weakref.finalize(storage, LiveMemory.remove, weakref.ref(self), key, storage.nbytes())
        if self.now > self.peak:
            self.peak = self.now
            self.gradients = sum(parameter.grad.nbytes for parameter in self.parameters if parameter.grad is not None)

    @staticmethod
    def remove(reference, key, size):  # with `self`, a finalizer would keep the parameters alive as long as its storage
        if memory := reference():
            memory.live.remove(key)
            memory.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        new = {key: storage for key, storage in self.storages(result).items() if key not in self.live}
        if new:
            given = self.storages((args, kwargs))
            self.add({key: storage for key, storage in new.items() if key not in given})
        return result


def count(task):
    """Returns (FLOPs of the matrix products and convolutions, peak bytes of new tensors) of one call of `task`."""
    with FlopCounterMode(display=False) as flops, LiveMemory() as memory:
        task()
    return flops.get_total_flops(), memory.peak


def synchronize(device):
    """Waits until `device` has finished all queued work."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def shares_by_operator(task, repeats, device):
    """The share of each of torch's operators in the time of `repeats` calls of `task`, with backward passes, largest first."""
    seconds = defaultdict(float)

    class Timer(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            start = perf_counter()
            result = function(*args, **(kwargs or {}))
            synchronize(device)
            name = function.overloadpacket.__name__.removeprefix("native_").removesuffix("_backward").rstrip("_")
            seconds[name] += perf_counter() - start
            return result

    with Timer():
        for _ in range(repeats):
            task()
    total = sum(seconds.values())
    return {name: spent / total for name, spent in sorted(seconds.items(), key=lambda item: -item[1])}


def time_in_turn(tasks, repeats, device):
    """The median seconds of each part of each task, timed in turn, so that changes in the machine's speed affect all equally."""
    seconds = {name: defaultdict(list) for name in tasks}
    for repeat in range(repeats + 1):
        for name, task in tasks.items():
            times, parts = [], []

            def mark(part):
                synchronize(device)
                parts.append(part)  # noqa: B023 - called within this iteration
                times.append(perf_counter())  # noqa: B023

            mark("start")
            task(mark)
            for part, start, end in zip(parts[1:], times, times[1:], strict=False):
                if repeat:  # the first round is a warm-up
                    seconds[name][part].append(end - start)
    return {name: {part: median(values) for part, values in parts.items()} for name, parts in seconds.items()}


def convolution_shapes(net, batch):
    """The (output channels, input channels, side) of the network's 3x3 convolutions. Timed one by one, they set the ceiling."""
    shapes = set()
    convolutions = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    hooks = [
        m.register_forward_pre_hook(lambda m, inputs: shapes.add((m.out_channels, *inputs[0].shape[1:3]))) for m in convolutions
    ]
    net(batch[0], 1.0, batch[1])
    for hook in hooks:
        hook.remove()
    return sorted(shapes)


def convolutions(shapes, batch_size, device, dtype):
    """Tasks for `time_in_turn` by name: each of the 3x3 convolutions `shapes` by itself, forward and backward.

    dtype: the precision of both images and weights, so that no casts are timed.
    """

    def task(x, weight, mark):
        y = F.conv2d(x, weight, padding=1)
        mark("forward")
        torch.autograd.grad(y, (x, weight), y.detach())  # unlike backward(), does not accumulate gradients
        mark("backward")

    tasks = {}
    for o, i, side in shapes:
        sizes = (batch_size, i, side, side), (o, i, 3, 3)
        inputs = [torch.randn(size).to(device, dtype, memory_format=memory_layout(device)).requires_grad_() for size in sizes]
        tasks[f"convolution {i} to {o} at {side}"] = partial(task, *inputs)
    return tasks
