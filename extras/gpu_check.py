"""Check training on this device against the CPU, measure its speed and memory, and run the scripts: ten minutes.

Usage: python -m extras.gpu_check [options]. It writes one page of Markdown, to read or to paste into an issue. Weights
and images are random. A part that fails is reported, and the others go on.
"""

import shlex
import subprocess
import sys
import tempfile
import time
import timeit
from argparse import Namespace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from torch.utils.collect_env import get_pretty_env_info

import checkpoint
import train_teacher
from evaluation.costs import teacher_costs, turn_costs
from extras.estimate import nbytes
from guidance import GuidanceModel
from model import denoising_loss
from support.device import MACHINE, autocast, choose_device, compile_networks
from support.optimizers import build_optimizer, optimizer_step
from support.options import Option, count, parse_args, path, read_yaml
from support.script import run_script, writing
from unified_model import UnifiedModel

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "configs" / "mnist0.yaml"
OPTIONS = {
    "check": [
        Option("batch_size", 128, count, "images per step"),
        Option("rounds", 7, count, "how many times each task is timed; medians are reported"),
        Option("output", "gpu_check.md", path, "the page to write"),
    ],
    "network (without CUDA the quickstart's, unless a flag is given)": train_teacher.NETWORK,
    "machine": MACHINE[:2],
}
SETTINGS = {  # what differs from fp32, AdamW and channels last
    "fp32": {},
    "tf32": dict(precision="tf32"),
    "bf16": dict(precision="bf16"),
    "bf16, Muon": dict(precision="bf16", optimizer="muon"),
    "bf16, NCHW": dict(precision="bf16", layout=torch.contiguous_format),  # on CUDA, eager norms copy channels last
    "bf16, compiled": dict(precision="bf16", compile=True),
}
STEPS = """
## Steps of training

"Off by" is relative to the CPU in fp32. Rounding makes about 1e-5 in fp32, 1e-3 in TF32, 1e-2 in bf16; more is a fault.
GiB: what a step takes at its peak beside weights and moments, measured on CUDA, and as `extras.estimate` counts it.

| | loss, off by | norm of the gradient, off by | images/s | TFLOP/s | share of a large product's | GiB | counted |
|---|---|---|---|---|---|---|---|"""


def main(argv=None):
    """Writes the page with the options in `argv`, by default those of the command line."""
    args = parse_args(OPTIONS, __doc__, argv)
    names = {option.name for option in train_teacher.NETWORK}
    if not torch.cuda.is_available() and not args.given & names:
        vars(args).update({name: value for name, value in read_yaml(DIGITS).items() if name in names})
    complete(args)
    device = choose_device(args)

    def tell(name, part, *arguments):
        try:
            write(part(*arguments))
        except Exception as error:
            write(f"| {name} | FAILED: {error!r:.300} |")

    def write(lines):
        print(lines)
        print(lines, file=page, flush=True)

    with tempfile.TemporaryDirectory() as folder, writing(args.output), open(args.output, "w") as page:
        facts = f"commit {checkpoint.versions()['commit']}, device {device}, {torch.get_num_threads()} threads"
        tell("machine", lambda: f"# Minimal DMD2, checked: {facts}\n\n```\n{get_pretty_env_info()}\n```")
        write(STEPS)
        expected = {name: step(args, torch.device("cpu"), *task) for name, task in make_tasks(args, "cpu").items()}
        for name, setting in SETTINGS.items():
            tell(name, steps, Namespace(**vars(args) | setting), name, expected)
        write("\n## Scripts\n\n| | exit status (0: as it should be) | seconds |\n|---|---|---|")
        for name, command in commands(shlex.quote(folder), args.device, device.type).items():
            tell(name, run, name, command)
        tell("resumed", resumed, folder)
    print(f"wrote {args.output}")


def complete(args):
    """Sets what the options leave open, and the first of `SETTINGS`."""
    vars(args).update(precision="fp32", compile=False, optimizer="adamw", layout=torch.channels_last)
    args.img_channels, args.label_dim = args.img_channels or 3, 10 if args.label_dim is None else args.label_dim


def make_tasks(args, device):
    """The steps of training on one batch, by name: (the optimizer, a function that returns the loss).

    Weights, batch, noise and noise levels are the same at every call, on every device.
    """
    torch.manual_seed(args.seed)
    shape = args.img_channels, args.img_resolution, args.img_resolution
    teacher, fake_unet = (train_teacher.build_network(args, shape[0], args.label_dim) for _ in range(2))
    for parameter in (*teacher.parameters(), *fake_unet.parameters()):
        parameter.data += 0.02 * torch.randn(parameter.shape)  # also where they start as zeros
    guidance = GuidanceModel(teacher, fake_unet=fake_unet, gan_classifier=True)
    model = UnifiedModel(guidance).to(device, memory_format=args.layout).eval()
    generator = model.feedforward_model
    drawn = *torch.randn(2, args.batch_size, *shape), torch.randn(args.batch_size).exp()
    images, noise, sigma = (part.to(device) for part in drawn)
    guidance.add_noise = lambda images, *_: (images + sigma[:, None, None, None] * noise, sigma)  # draws nothing
    labels = (torch.arange(args.batch_size) % max(1, args.label_dim)).to(device)
    compile_networks(args, generator, teacher, fake_unet)
    if args.compile and not generator._compiled_call_impl:
        raise RuntimeError("torch.compile is not available")

    def teacher_step():
        denoised = generator(*guidance.add_noise(images), labels)
        return denoising_loss(denoised, images, sigma, args.sigma_data, args.prediction)

    def generator_turn():
        return sum(model.generator_turn(noise, labels)[0].values())

    def guidance_turn():
        return sum(model.guidance_turn(images, labels, images.flip(0), labels)[0].values())

    tasks = {"teacher step": (generator, teacher_step), "generator turn": (generator, generator_turn)}
    tasks["guidance turn"] = fake_unet, guidance_turn
    return {name: (build_optimizer(args.optimizer, net, 1.0), loss_of) for name, (net, loss_of) in tasks.items()}


def step(args, device, optimizer, loss_of):
    """A step at learning rate 0, which leaves the weights. Returns its loss and its gradient's norm."""
    with autocast(args, device):
        loss = loss_of()
    loss.backward()
    return loss.item(), optimizer_step(optimizer, 0.0, 1e9).item()


def steps(args, setting, expected):
    """A row of the table for each step of training."""
    device = choose_device(args)
    tasks, bf16, cuda = make_tasks(args, device), args.precision == "bf16", device.type == "cuda"
    side = 8192 if cuda else 1024
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    peak_rate = 2 * side**3 / seconds_of(lambda: (matrix @ matrix)[0, 0].item(), args.rounds)
    rows = []
    for (name, task), (flops, memory) in zip(tasks.items(), count_costs(args, bf16), strict=True):
        results = step(args, device, *task)
        off = " | ".join(f"{abs(got / right - 1):.1e}" for got, right in zip(results, expected[name], strict=True))
        before = torch.cuda.memory_allocated()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = seconds_of(partial(step, args, device, *task), args.rounds)
        used = f"{(torch.cuda.max_memory_allocated() - before) / 2**30:.3g}" if cuda else ""
        speed = f"{args.batch_size / seconds:.4g} | {flops / seconds / 1e12:.3g} | {flops / seconds / peak_rate:.0%}"
        rows.append(f"| {setting}: {name} | {off} | {speed} | {used} | {memory / 2**30:.3g} |")
    return "\n".join(rows)


def seconds_of(task, rounds):
    """The median of a call of `task`, which waits for its result. The first one warms up."""
    return median(timeit.repeat(task, number=1, repeat=rounds + 1)[1:])


def count_costs(args, bf16):
    """(FLOPs, bytes of activations and gradients) of each step, as `extras.estimate` counts them."""
    with torch.device("meta"):
        net = train_teacher.build_network(args, args.img_channels, args.label_dim)
        model = UnifiedModel(GuidanceModel(net, gan_classifier=True)).eval()
    of_teacher = teacher_costs(model.feedforward_model, args.batch_size, bf16)
    whole = [of_teacher, *turn_costs(model, args.batch_size, bf16=bf16)[1:]]
    return [(flops, memory + nbytes(net)) for flops, memory in whole]  # with its gradients


def commands(folder, device, kind):
    """Command lines of the scripts, by name, for small networks on digits. Their files go to `folder`."""
    training = f"--dataset mnist5k --batch_size 16 --step_number 4 --save_every 2 --device {device}"
    network = "--img_resolution 8 --model_channels 16 --channel_mult 1 2 --num_blocks 1"
    teacher, student = f"{folder}/whole/teacher_final.pt", f"{folder}/dmd2/dmd2_final.pt"
    dmd2 = f"train_dmd2.py {training} --teacher_checkpoint {teacher} --gan_classifier --precision bf16 --output_dir"
    half = f"--device {device} --resume_from_checkpoint {folder}/whole/teacher_checkpoint_step_2.pt"
    images = f"--checkpoint {student} --output_dir {folder} --device {device} --num_samples"
    found = {
        "teacher": f"train_teacher.py {training} {network} --output_dir {folder}/whole",
        "teacher, resumed": f"train_teacher.py {half} --output_dir {folder}/again",
        "DMD2 with GAN, bf16": f"{dmd2} {folder}/dmd2",
        "images": f"generate.py {images} 2",
        "evaluation": f"evaluate.py {images} 200 --features classifier --data_dir {folder}",
    }
    if all(map(find_spec, ("onnx", "onnxruntime", "onnxscript"))):
        found["ONNX"] = f"export.py --checkpoint {student} --output {folder}/x.onnx"
    if kind == "cpu" or torch.cuda.device_count() > 1:
        found["DMD2, two processes"] = f"-m torch.distributed.run --standalone --nproc_per_node=2 {dmd2} {folder}/two"
    return found


def run(name, command):
    start, words = time.perf_counter(), [sys.executable, *shlex.split(command)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=900)
    told = f": {(done.stderr.strip().splitlines() or [''])[-1]:.300}" if done.returncode else ""
    return f"| {name} | {done.returncode}{told} | {time.perf_counter() - start:.0f} |"


def resumed(folder):
    files = (f"{folder}/{name}/teacher_final.pt" for name in ("whole", "again"))
    whole, again = (checkpoint.load(file)["model_state_dict"] for file in files)
    off = max((whole[name] - again[name]).abs().max().item() for name in whole)
    return f"| largest difference of the resumed teacher's weights | {off:.1e} | |"


if __name__ == "__main__":
    run_script(main)
