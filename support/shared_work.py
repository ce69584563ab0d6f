"""Work that torchrun's processes share outside training: batches of images to sample or to look at, and downloads."""

from contextlib import contextmanager

import torch
import torch.distributed as dist

from support import processes
from support.processes import own_rows, world_size


def map_batches(function, batch_size, *tensors):
    """`function` of the rows of `tensors`, each `[N, ...]`, `batch_size` at once over all processes, joined on the CPU.

    `function` returns a tensor `[n, ...]`, or a tuple of them. The processes share the rows, and each returns all
    results.
    """
    share = -(-batch_size // world_size())
    batches = zip(*[own_rows(tensor).split(share) for tensor in tensors], strict=True)
    results = [function(*batch) for batch in batches]
    if torch.is_tensor(results[0]):
        return gather_rows(torch.cat([result.cpu() for result in results]))
    return tuple(gather_rows(torch.cat([part.cpu() for part in parts])) for parts in zip(*results, strict=True))


def gather_rows(rows):
    """All processes' rows, in the order of `own_rows`, in every process. `rows` is on the CPU."""
    if world_size() == 1:
        return rows
    gathered = [None] * world_size()
    dist.all_gather_object(gathered, rows)
    return torch.cat(gathered)


@contextmanager
def one_first():
    """Rank 0 enters first, then the first process of each other machine, then the rest, which find what was downloaded.

    If machines share a folder, only rank 0 downloads; otherwise, one process per machine.
    """
    turn = 0 if processes.is_main() else 1 if processes.LOCAL_RANK == 0 else 2
    for _ in range(turn):
        processes.barrier()
    yield  # a process that fails here exits, and torchrun ends the others
    for _ in range(2 - turn):
        processes.barrier()
