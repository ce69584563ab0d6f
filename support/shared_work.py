"""What torchrun's processes do one after another: downloads."""

from contextlib import contextmanager

from support import processes


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
