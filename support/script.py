"""How a script ends: a user's mistake is one line and exit status 2, a bug shows its traceback."""

import io
import os
import sys
from contextlib import contextmanager, suppress

import torch


class UserError(ValueError):
    """A user's mistake, reported in one line: what is wrong, where, and what would be right."""

    def __init__(self, message):
        super().__init__(" ".join(message.splitlines()))  # names in a damaged file may contain line breaks


@contextmanager
def as_user_error(where, kind=ValueError):
    """Turns errors of `kind`, by default of the method, which knows no users, into a UserError that names `where`."""
    try:
        yield
    except UserError:
        raise
    except kind as error:
        reason = getattr(error, "strerror", None) or str(error).split(" <_io")[0] or type(error).__name__
        raise UserError(f"{where}: {reason}") from None


def writing(path):
    """Turns a failure to write to `path` (full disk, read-only folder) into a UserError that names it."""
    return as_user_error(f"{path}: could not be written", OSError)


def make_folder(option, path):
    """Makes the folder `path`, the value of `option`. Raises UserError if that fails."""
    with as_user_error(f"{option} {path}", OSError):
        os.makedirs(path, exist_ok=True)


def run_script(main):
    """Calls `main()` and ends the process with the exit status that it returns."""
    outlive_readers()
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # outside the training loop, which handles it
        sys.exit(130)
    except Exception as error:
        what = str(error)
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in what:
            mend = "take a smaller --batch_size or --num_samples, or in training a larger --grad_accum"
            what = f"out of memory: {mend} ({what.splitlines()[0] if what else 'MemoryError':.200})"
        elif isinstance(error, PermissionError):  # such as of a folder that may not be entered
            what = f"{error.filename}: {error.strerror}"
        elif not isinstance(error, UserError):
            raise
        print(f"{os.path.basename(sys.argv[0])}: error: {what}", file=sys.stderr, flush=True)
        sys.exit(2)


class Output(io.FileIO):
    """A file descriptor to write to that drops what cannot be written: its pipe or terminal is gone, its disk full."""

    def write(self, data):
        with suppress(OSError):
            return super().write(data)
        return memoryview(data).nbytes


def outlive_readers():
    """Makes standard output and error survive closed readers. A notebook's streams stay as they are."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before the start; also keeps the next file from taking its descriptor
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the process ends
        elif stream is getattr(sys, f"__{name}__"):
            output = io.BufferedWriter(Output(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(output, stream.encoding, "replace", line_buffering=True))
