"""Standard output and error that survive a closed terminal or pipe: from then on, output is dropped."""

import errno
import io
import os
import sys

READER_GONE = (errno.EPIPE, errno.EIO)  # of a pipe, of a terminal


class Output(io.FileIO):
    """A file descriptor to write to that raises no error when its reader is gone."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in READER_GONE:
                raise
            return memoryview(data).nbytes


def outlive_readers():
    """Makes standard output and error survive closed readers, once. Streams of a notebook or a test runner stay as they are."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before the start; also keeps the next file from taking its descriptor
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the process ends
        elif stream is getattr(sys, f"__{name}__"):
            output = io.BufferedWriter(Output(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(output, stream.encoding, stream.errors, line_buffering=True))
