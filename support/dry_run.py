"""Counts the memory and time of a training: its own loop runs on torch's `meta` device, where tensors have only shapes."""

import gc
import os
import sys

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import checkpoint
from support.config import UserError
from support.costs import LiveMemory
from support.runs import Run

SHARE_OF_PEAK = 0.4  # of a GPU's peak FLOP/s that training reaches; assumed, not measured
HEADROOM = 0.15  # of a GPU's memory, for what is not counted: driver, cuDNN workspaces, gaps between tensors; assumed
GIB = 2**30
aten = torch.ops.aten


class DryRun(Run):
    """A `Run` that only counts. It traces the script's own loop, locks no folder and writes nothing.

    For each level of the student, the loop runs one iteration with a generator update and, if there are such, one without. A batch
    in many parts (`--grad_accum`) is traced in two, since a third part takes the memory of the second; its FLOPs are those of the
    batch in one part.
    """

    def __init__(self, args, kind):
        super().__init__(args, kind)
        args = self.args
        args.compile, args.log_every = False, sys.maxsize  # only the log reads values back from the device
        self.batch_size, self.parts_asked, self.first_step = args.batch_size, args.grad_accum, self.step

    def start(self, device, batches, parts, **facts):
        self.device, self.batches, self.parts, self.facts = device, batches, parts, facts
        if self.resumed:
            self.restore()
        self.resumed, self.logger = None, Silence()
        self.optimizers = [part for part in parts.values() if isinstance(part, torch.optim.Optimizer)]
        for optimizer in self.optimizers:  # the first step creates the moments, and all later ones hold them
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
        average = parts.get("ema_state_dict")
        moments = [value for optimizer in self.optimizers for state in optimizer.state.values() for value in state.values()]
        self.memory = {
            "weights": 0,
            "averaged weights": size(average.state_dict().values() if average else []),
            "optimizers' moments": size(moments),
            "data set": size([batches.dataset.images, batches.dataset.labels]),
        }
        self.memory["weights"] = size(on_device()) - sum(self.memory.values())
        self.iterations = self.trace_all()

    done = False

    def goes_on(self):
        return next(self.iterations, False)

    def save_if_due(self):
        pass

    def trace_all(self):
        """A generator: the loop runs one iteration between two of its values. Prints the counts."""
        args = self.args
        updates = getattr(args, "dfake_gen_update_ratio", 1)
        flops, memory = yield from self.trace_levels(0, self.parts_asked, updates)
        if self.parts_asked > 2:  # Muon's own products count once per batch, so a traced part of it would give them too much weight
            flops, _ = yield from self.trace_levels(0, 1, updates)
        if updates > 1:
            flops_between, _ = yield from self.trace_levels(1, 1, updates)  # on `meta` large tensors cost nothing
            flops = (flops + (updates - 1) * flops_between) / updates
        self.flops = flops * self.batch_size  # per iteration, on average
        self.report(memory)
        if args.memory_gb:
            yield from self.suggest(memory)

    def trace_levels(self, step, parts, updates):
        """`trace` of iteration `step` for each of the student's levels, `updates` iterations apart: (mean FLOPs, most memory)."""
        flops, memories, levels = 0, [], len(self.facts.get("student_sigmas", [None]))
        for level in range(levels):
            counted, memory = yield from self.trace(step + level * updates, parts)
            flops += counted / levels
            memories.append(memory)
        return flops, max(memories, key=lambda memory: memory.peak)

    def trace(self, step, parts):
        """Runs iteration `step` of the loop with a batch in `parts` parts. Returns (FLOPs per image, `LiveMemory`)."""
        self.step, self.args.grad_accum = step, min(parts, 2)
        self.batches.batch_size = self.batch_size // parts * self.args.grad_accum
        trained = [parameter for optimizer in self.optimizers for parameter in optimizer.param_groups[0]["params"]]
        with Arithmetic() as arithmetic, LiveMemory(on_device(), trained, "meta") as memory, AsOnCuda(self.args.precision):
            yield True
        return arithmetic.flops / self.batches.batch_size, memory

    def suggest(self, asked):
        """Prints the least --grad_accum that fits into --memory_gb; `asked` is the memory of the run with its own options."""
        limit, option = (1 - HEADROOM) * self.args.memory_gb * GIB, f"--memory_gb {self.args.memory_gb:g}"
        spare, fixed = f"{HEADROOM:.0%} is reserved for what is not counted", sum(self.memory.values())
        per_image = (asked.peak - asked.gradients - fixed) / (self.batch_size // self.parts_asked)
        for parts in (parts for parts in range(1, self.batch_size + 1) if self.batch_size % parts == 0):
            if fixed + 0.9 * per_image * self.batch_size / parts > limit:
                continue  # far too much: not worth a trace
            memory = asked if parts == self.parts_asked else (yield from self.trace(0, parts))[1]
            if memory.peak <= limit:
                print(f"{option}: use --grad_accum {parts}, which takes {memory.peak / GIB:.4g} GiB; {spare}")
                return
        print(f"{option}: too little even for one image at a time; {spare}")

    def report(self, memory):
        args, flops, steps = self.args, self.flops, self.args.step_number - self.first_step
        rows = self.memory | {"gradients": memory.gradients}
        rows["activations"] = memory.peak - sum(rows.values())
        print(f"counted, nothing trained: batch {self.batch_size} in {self.parts_asked} parts, {args.precision}, GiB at the peak")
        for name, value in (rows | {"together": memory.peak}).items():
            print(f"  {name:20} {value / GIB:10.4g}")
        print(f"arithmetic: {flops / 1e12:.4g} TFLOP per iteration, {steps} iterations")
        if args.peak_tflops:
            seconds = flops / (SHARE_OF_PEAK * args.peak_tflops * 1e12)
            print(
                f"time: {seconds:.3g} s per iteration, {seconds * steps / 3600:.3g} hours in total, at {SHARE_OF_PEAK:.0%} of "
                f"{args.peak_tflops:g} TFLOP/s, taken as the peak in {args.precision}; that share is assumed, not measured"
            )
        else:
            print("time: give --peak_tflops, the device's peak at the run's precision (docs/memory-and-time.md lists some)")

    def finish(self):
        return 0


class Silence:
    """The logger of a dry run."""

    def message(self, text):
        print(text)

    def log(self, step, metrics):
        pass

    def wants_samples(self, step):
        return False

    def wandb_wants(self, what, step):
        return False


def load_teacher(path):
    """`checkpoint.load_teacher(path)`. If `path` is a network's name, the state of a new one with default arguments."""
    names = [name for name in checkpoint.NETWORKS if name != "DiffusersUNet"]  # its arguments have no defaults
    if path in names:
        net = checkpoint.NETWORKS[path]()
        return {"model_state_dict": net.state_dict(), "model_config": net.config, "config": {}, "step": 0}
    try:
        return checkpoint.load_teacher(path)
    except UserError as error:
        hint = f"; --dry_run also takes a network's name: {', '.join(names)}"
        raise UserError(f"{error}{'' if os.path.exists(path) else hint}") from None


def size(tensors):
    """The bytes of those `tensors` that are on `meta`."""
    return LiveMemory(list(tensors), device_type="meta").now


def on_device(kind="meta"):
    """All tensors that exist on the kind of device."""
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor) and thing.device.type == kind]


class AsOnCuda(TorchFunctionMode):
    """Makes `meta` choose operators and precision as CUDA does: fused attention and dropout, and with bf16 the casts of autocast.

    `meta` has no autocast of its own.
    """

    CAST = (
        "conv1d",
        "conv2d",
        "conv_transpose2d",
        "linear",
        "matmul",
        "__matmul__",
        "bmm",
        "einsum",
        "scaled_dot_product_attention",
    )

    def __init__(self, precision):
        super().__init__()
        self.bf16 = precision == "bf16"

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if self.bf16 and getattr(function, "__name__", "") in self.CAST:
            args = [arg.bfloat16() if isinstance(arg, torch.Tensor) and arg.dtype == torch.float32 else arg for arg in args]
        if function is F.scaled_dot_product_attention:
            return aten._scaled_dot_product_efficient_attention(*args[:3], None, True)[0]
        if function is F.dropout and kwargs["training"]:
            return torch.native_dropout(*args, kwargs["p"], True)[0]
        return function(*args, **(kwargs or {}))


class Arithmetic(TorchDispatchMode):
    """Counts floating-point operations, `flops`, with torch's formulas, as `costs.count` does, in a quarter of the time.

    It makes the results of group norms itself: torch's own take longer on `meta` than all other operators together.
    """

    flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is aten.native_group_norm.default:
            x, *_, batch, _, _, groups, _ = args
            return torch.empty_like(x), x.new_empty(batch, groups), x.new_empty(batch, groups)
        if function is aten.native_group_norm_backward.default:
            _, x, _, _, weight, *_ = args
            return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
        result = function(*args, **(kwargs or {}))
        if formula := flop_registry.get(function.overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result
