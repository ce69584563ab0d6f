"""One process, or several under torchrun: each takes its rows of every global batch, and what they find is averaged.

Random numbers are drawn for the global batch, alike in every process, which keeps its rows: so a run is the same at any number of
processes. With one process nothing here costs or changes anything.
"""

import atexit
import os
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist

LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # this process's number on its machine


def start():
    """Joins the processes that torchrun started: gloo for tensors on the CPU, NCCL for those on GPUs. Only rank 0 prints."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Imported later (as torch's optimizers do), its functions would keep the group, which then outlives the interpreter;
        # its threads, with tensors to let go of, abort the process now and then.
        import torch.distributed.nn  # noqa: F401

        dist.init_process_group()
        atexit.register(dist.destroy_process_group)
        if rank():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def own_rows(batch):
    """This process's rows of a global batch `[B, ...]`: `[B / world_size, ...]`, give or take one."""
    return batch.tensor_split(world_size())[rank()]


def rows_of(draw):
    """`draw`, torch.randn or torch.randint, as a function that draws for all processes' batches and returns this process's rows.

    It is called as `draw` is, the size `(B, ...)` being this process's.
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
    """Replaces each tensor by its mean over the processes, in place, by a single message.

    DistributedDataParallel would overlap this with the backward pass; but it wants each network called through its wrapper and
    once a backward pass, where DMD2 calls `fake_unet` up to three times, with and without gradients.
    """
    if world_size() > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        parts = (flat / world_size()).split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


def agree(value):
    """The largest of the processes' integers `value`: what they all act on. Ends this process where another is gone."""
    if world_size() == 1:
        return value
    largest = torch.tensor(value)
    try:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    except RuntimeError:  # that process has told why
        sys.exit(1)
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
    """Lets one process of each machine through first, so that it downloads and the others find what it has."""
    if LOCAL_RANK:
        barrier()
    try:
        yield
    finally:
        if not LOCAL_RANK:
            barrier()
