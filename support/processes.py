"""One process, or several under torchrun: each takes its rows of every batch, and their gradients are averaged.

They start with the same weights, as they draw them from the same seed. One process costs and changes nothing.
"""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def join():
    """Joins the processes that torchrun started, if it did. Only rank 0 prints."""
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        # If it is imported later (torch's optimizers do), its functions keep the group alive beyond the interpreter.
        # The group's threads then sometimes abort the process when they free tensors.
        from torch.distributed import nn  # noqa: F401

        # Numbers that all agree on go between CPUs, on every device. All others wait while rank 0 downloads data.
        backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backends, timeout=timedelta(hours=3))
        if not is_main():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends


def leave():
    """Waits for the other processes, then ends their group: when the first process ends, torchrun ends the others."""
    if dist.is_initialized():
        all_max(0)
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank():
    """This process's number on its machine."""
    return int(os.environ["LOCAL_RANK"]) if dist.is_initialized() else 0


def is_main():
    """Whether this process writes files and prints."""
    return rank() == 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def all_mean(tensors):
    """Replaces each tensor by its mean over the processes, in place. A message per tensor would take ten times as long.

    DistributedDataParallel would overlap this with the backward pass. But it requires that each network is called
    through its wrapper, once per backward pass; DMD2 calls `fake_unet` up to three times, with and without gradients.
    """
    if world_size() > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        means = (flat / world_size()).split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [mean.view(tensor.shape) for mean, tensor in zip(means, tensors, strict=True)])


def all_max(value):
    """The largest of the processes' integers `value`. Each process waits for the others, but not for its GPU."""
    largest = torch.tensor(value)
    if world_size() > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)
