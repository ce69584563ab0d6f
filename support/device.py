"""Where a script computes, and how: the device, the precision, torch.compile, and the memory that glibc keeps."""

import ctypes
import platform

import torch

from support import processes
from support.options import Option, choice, flag, number
from support.script import UserError

MACHINE = [
    Option("seed", 0, number(0, 2**31 - 1, whole=True), "seed of everything random"),
    Option("device", "auto", choice("auto", "cpu", "cuda", *(f"cuda:{n}" for n in range(16))), "auto: CUDA, if any"),
    Option("precision", "tf32", choice("fp32", "tf32", "bf16"), "tf32 is fp32 except on CUDA; bf16 is autocast"),
    Option("compile", False, flag, "compile the networks with torch.compile: slower to start, then faster"),
]


def choose_device(args):
    """The torch device of `--device`, set up for `--precision`. Torchrun's processes have a GPU each.

    Raises UserError if the device is not available, and under torchrun in a script that does not share its work.
    """
    if torch.distributed.is_torchelastic_launched() and not torch.distributed.is_initialized():
        raise UserError("this script is one process: start it without torchrun")
    name, gpus = args.device, torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if name.startswith("cuda:") and processes.world_size() > 1:
        raise UserError(f"--device {name}: each process needs a GPU of its own; use --device cuda or auto")
    device = torch.device(f"cuda:{processes.local_rank()}" if name == "cuda" else name)
    if device.type == "cuda" and device.index >= gpus:
        raise UserError(f"--device {args.device}: this machine has {gpus} CUDA devices, one per process; try cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
    torch.backends.cudnn.benchmark = True  # shapes never change
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    return device


def keep_freed_memory():
    """Makes glibc keep freed tensors' memory for new ones: the kernel would clear each page anew, at every step."""
    if platform.libc_ver()[0] == "glibc":
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3  # as in malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)  # the most that earlier versions accept


def autocast(args, device):
    """The context in which networks run: bfloat16 with `--precision bf16`.

    It applies to convolutions and matrix products; weights, preconditioning and losses stay in float32. Its cache of
    cast weights is off: it would reuse weights that were cast without gradients in a pass that needs gradients.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16", cache_enabled=False)


def compile_networks(args, *networks):
    """Compiles the networks in place with torch.compile, if `--compile` is on and this machine has a compiler."""
    if not args.compile:
        return
    try:
        torch.compile(torch.sin)(next(networks[0].parameters()).detach())
    except Exception as error:  # compilers may raise anything
        print(f"--compile: not available here, going on without ({' '.join(str(error).split())[:120]})")
        return
    torch._dynamo.config.cache_size_limit = 64  # one for each network, batch size and kind of pass
    for network in networks:
        # One compilation per batch size: with dynamic sizes, Inductor skips its optimisation of convolutions' layouts.
        network.compile(dynamic=False)
