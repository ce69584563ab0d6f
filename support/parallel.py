"""One process, or several under torchrun: each takes its rows of every global batch, and their gradients are averaged.

Every process draws the same random numbers for the global batch and keeps those of its rows, so a run does not depend on the
number of processes. With one process nothing here costs or changes anything.
"""

import atexit
import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from support.config import TORCHRUN

LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # this process's number on its machine


def backends(device):
    """The backends for messages: gloo for CPU tensors, which `agree` sends on every device; NCCL for CUDA tensors."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def start(device):
    """Joins the processes that torchrun started. Only rank 0 prints."""
    if TORCHRUN:
        # If it is imported later (torch's optimizers do), its functions keep the group alive beyond the interpreter. The group's
        # threads then sometimes abort the process when they free tensors.
        import torch.distributed.nn  # noqa: F401

        # All others wait while rank 0 trains a judge, or writes the pixels of a large ZIP.
        dist.init_process_group(backends(device), timeout=timedelta(hours=3))
        atexit.register(dist.destroy_process_group)
        if rank():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def own_rows(batch):
    """This process's rows of a global batch `[B, ...]`: `[B / world_size, ...]`, or one more or less."""
    return batch.tensor_split(world_size())[rank()]


def rows_of(draw):
    """`draw`, torch.randn or torch.randint, as a function that draws for all processes' batches and returns this process's rows.

    It is called like `draw`, with the size `(B, ...)` of this process's rows.
    """

    def draw_rows(*arguments, **options):
        *bounds, (rows, *shape) = arguments
        return own_rows(draw(*bounds, (rows * world_size(), *shape), **options))

    return draw_rows


def micro_batches(parts, *batches):
    """This process's rows of each of `parts` successive parts of the global batches, as tuples."""
    return zip(*[map(own_rows, batch.chunk(parts)) for batch in batches], strict=True)


def gather_rows(rows):
    """All processes' rows, in the order of `own_rows`, in every process. `rows` is on the CPU."""
    if world_size() == 1:
        return rows
    gathered = [None] * world_size()
    dist.all_gather_object(gathered, rows)
    return torch.cat(gathered)


def average(tensors):
    """Replaces each tensor by its mean over the processes, in place, with a single message.

    DistributedDataParallel would overlap this with the backward pass. But it requires that each network is called through its
    wrapper and once per backward pass, while DMD2 calls `fake_unet` up to three times, with and without gradients.
    """
    if world_size() > 1:
        tensors = [in_memory_order(tensor) for tensor in tensors]
        flat = torch.cat(tensors)
        dist.all_reduce(flat)
        torch._foreach_copy_(tensors, (flat / world_size()).split([len(tensor) for tensor in tensors]))


def total(tensor):
    """The sum of `tensor` over the processes, in each of them."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def std(rows):
    """The standard deviation over the global batch, `[...]`, from each process's `rows` of it, `[B / world_size, ...]`."""
    count = len(rows) * world_size()
    mean = total(rows.sum(0)) / count
    return (total((rows - mean).square().sum(0)) / count).sqrt()


def in_memory_order(tensor):
    """The elements of a dense tensor as a vector in the order of memory, for any layout: a view, which costs no copy."""
    return tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True)).view(-1)


def agree(value):
    """The largest of the processes' integers `value`, so that all act alike. Sent from the CPU: a GPU would have to synchronise."""
    if world_size() == 1:
        return value
    largest = torch.tensor(value)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def broadcast(module):
    """Gives every process rank 0's weights of `module`."""
    if world_size() > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)


def barrier():
    agree(0)


@contextmanager
def one_first():
    """Rank 0 enters first, then the first process of each other machine, then the rest, which find what was downloaded.

    If machines share a folder, only rank 0 downloads; otherwise, one process per machine.
    """
    turn = 0 if rank() == 0 else 1 if LOCAL_RANK == 0 else 2
    for _ in range(turn):
        barrier()
    yield  # a process that fails here exits, and torchrun ends the others
    for _ in range(2 - turn):
        barrier()


def first_to_fail():
    """Whether this is the first process to ask. It reports its error; the others fail because of it, or in the same way."""
    try:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timedelta(seconds=10))
        return store.add(f"failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except (KeyError, RuntimeError):  # torchrun's own store is gone: better to report twice than never
        return True
