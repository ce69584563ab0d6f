"""Two processes on a CPU: one run, with averaged gradients; errors."""

import fcntl
import re
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, TINY_NET, flags, metrics, refuses, run_script, succeed, tiny_unet, torchrun
from test_scripts import final

import checkpoint
from data import Batches, Dataset
from guidance import GuidanceModel
from support import processes
from unified_model import UnifiedModel

RUN = flags(*TINY, step_number=20, log_every=1, lr_warmup_steps=0)
TEACHER = flags(*RUN, *TINY_NET, dropout=0)
DMD2 = flags(*RUN, generator_lr=1e-3, guidance_lr=1e-3, dfake_gen_update_ratio=2, gan_classifier=True, ema_decay=0.9)
DMD2 += flags(grad_accum=2)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Folder with `one/` and `two/`, a teacher and a generator in each, trained by one process and by two."""
    folder = tmp_path_factory.mktemp("parallel")
    dmd2 = [*DMD2, "--teacher_checkpoint", final(folder / "one", "teacher")]
    for name, run in (("one", run_script), ("two", torchrun)):
        for stage, options in (("teacher", TEACHER), ("dmd2", dmd2)):
            done = run(f"train_{stage}.py", *options, output_dir=folder / name / stage)
            assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("stage", ["teacher", "dmd2"])
def test_two_processes_are_one_run(both, stage):
    """Each step, one line, as with one process; the first iteration has the same weights and real images."""
    one, two = metrics(both / "one" / stage), metrics(both / "two" / stage)
    assert [row["step"] for row in two] == list(range(1, 21))
    assert all(row.keys() == other.keys() for row, other in zip(one, two, strict=True))
    states = [checkpoint.load(final(both / name, stage)) for name in ("one", "two")]
    assert states[0].keys() == states[1].keys() and states[0]["images_seen"] == states[1]["images_seen"] == 320


STEPS = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch
from conftest import tiny_unet
from model import denoising_loss
from support import processes
from support.optimizers import optimizer_step
processes.join()
net = tiny_unet(dropout=0.0).to(memory_format=torch.channels_last)
optimizer = torch.optim.SGD(net.parameters(), fused=True)  # unlike Adam's, its steps tell a sum from a mean
draws = torch.Generator().manual_seed(0)  # the same in all processes
for _ in range(3):
    images, noise = torch.randn(2, 8, 1, 8, 8, generator=draws)
    labels, sigma = torch.randint(10, (8,), generator=draws), torch.rand(8, generator=draws) + 0.1
    x, n, y, s = (all.chunk(processes.world_size())[processes.rank()] for all in (images, noise, labels, sigma))
    denoising_loss(net(x + s[:, None, None, None] * n, s, y), x, s).backward()
    optimizer_step(optimizer, 1e-2, 1e9)
if processes.is_main():
    torch.save(net.state_dict(), sys.argv[1])
processes.leave()
"""


def test_two_processes_given_the_same_draws_make_the_step_of_one(tmp_path):
    (tmp_path / "script.py").write_text(STEPS.format(root=str(ROOT)))
    for name, run in (("one", run_script), ("two", torchrun)):
        done = run(tmp_path / "script.py", tmp_path / name)
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5)


def test_each_process_has_its_rows_of_a_batch(monkeypatch):
    pixels = torch.arange(24, dtype=torch.uint8).reshape(24, 1, 1, 1)
    whole, *parts = (Batches(Dataset(pixels, torch.arange(24), []), 8, seed=0, hflip=True) for _ in range(3))
    for _ in range(4):
        images, labels = next(whole)
        monkeypatch.setattr(processes, "world_size", lambda: 2)
        rows = []
        for number, part in enumerate(parts):
            monkeypatch.setattr(processes, "rank", lambda number=number: number)
            rows.append(next(part))
        monkeypatch.undo()
        assert [len(y) for _, y in rows] == [4, 4] and torch.equal(torch.cat([y for _, y in rows]), labels)
        assert torch.equal(torch.cat([x for x, _ in rows]), images)


def test_a_run_goes_on_with_another_number_of_processes(both, tmp_path):
    options = dict(teacher_checkpoint=final(both / "one", "teacher"), step_number=22, output_dir=tmp_path / "out")
    succeed("train_dmd2.py", *DMD2, **options, resume_from_checkpoint=final(both / "two", "dmd2"))
    assert [row["step"] for row in metrics(tmp_path / "out")] == [21, 22]


@pytest.mark.parametrize("script", ["evaluate", "generate", "compare"])
def test_what_shares_no_work_refuses_torchrun(both, script):
    done = torchrun(f"{script}.py", *(["--step_number", "1"] if script == "compare" else []))
    told = f"{script}.py: error: this script is one process: start it without torchrun"
    assert done.returncode and told in done.stderr and "Error: this" not in done.stderr


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "world_size", lambda: 3)
    told = "--batch_size 16 must be divisible by --grad_accum 1 times torchrun's 3 processes"
    refuses(told, "train_teacher.py", *TEACHER, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- precision and compilation --------------------------------------------------------------------------------------


def test_bf16_trains_nearly_like_fp32(runs, tmp_path):
    options = flags(*DMD2, teacher_checkpoint=final(runs, "teacher"), step_number=6)
    for precision in ("fp32", "bf16"):
        succeed("train_dmd2.py", *options, precision=precision, output_dir=tmp_path / precision)
    full, half = metrics(tmp_path / "fp32"), metrics(tmp_path / "bf16")
    for name in ("loss_fake_mean", "guidance_cls_loss"):
        a, b = [row[name] for row in full], [row[name] for row in half]
        assert a != b and b == pytest.approx(a, rel=0.05)
    state = checkpoint.load(tmp_path / "bf16" / "dmd2_final.pt")
    assert {tensor.dtype for tensor in state["feedforward_model_state_dict"].values()} == {torch.float32}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the threads' names from /proc")
def test_the_threads_of_the_group_end_before_the_interpreter(tmp_path):
    """If they outlive it, freeing a tensor aborts the process (pytorch/pytorch issue 190489)."""
    (tmp_path / "script.py").write_text(f"""
import atexit, os, sys, time
import torch
from pathlib import Path

def count():
    try:
        return sum("gloo" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))
    except OSError:  # one ended meanwhile
        return count()

def report():
    os.write(2, b"threads: %d\\n" % count())  # at once: two processes write

def report_the_end():
    deadline = time.monotonic() + 2
    while count() and time.monotonic() < deadline:  # a thread that has been joined may be listed a moment longer
        time.sleep(0.01)
    report()

atexit.register(report_the_end)
sys.path.insert(0, {str(ROOT)!r})
from support import processes
processes.join()
report()
import torch._dynamo  # as torch's optimizers do
processes.leave()
""")
    done = torchrun(tmp_path / "script.py")
    assert done.returncode == 0, done.stderr
    counts = re.findall(r"threads: (\d+)", done.stderr)
    assert len(counts) == 4 and counts.count("0") == 2, done.stderr


def test_a_mistake_under_torchrun_is_one_line(both):
    """Of each process, also if rank 0 alone can see it, as with a folder that is in use."""
    teacher, folder = final(both / "one", "teacher"), both / "two/dmd2"
    with (folder / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = torchrun("train_dmd2.py", *DMD2, "--overwrite", teacher_checkpoint=teacher, output_dir=folder)
    assert done.returncode and "exitcode  : 2" in done.stderr
    told = f"train_dmd2.py: error: --output_dir {folder}: "
    assert f"{told}another process trains there" in done.stderr and done.stderr.count(told) == 2
    assert "Traceback" not in done.stderr.split("torch/")[0] and "Connection closed" not in done.stderr


def test_rank_0_alone_draws_the_teachers_grid(both, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("""
import os, sampling
heun_sampler = sampling.heun_sampler
def told(*arguments):
    os.write(2, b"drawn by rank %s." % os.environb[b"RANK"])
    return heun_sampler(*arguments)
sampling.heun_sampler = told
""")
    options = dict(teacher_checkpoint=final(both / "one", "teacher"), output_dir=tmp_path / "out", step_number=1)
    done = torchrun("train_dmd2.py", *DMD2, **options, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert done.returncode == 0 and re.findall("drawn by rank .", done.stderr) == ["drawn by rank 0"], done.stderr


FAILS = """
from support import processes
from support.script import UserError, run_script

def main():
    processes.join()
    processes.all_max(0)
    if processes.rank() == {rank}:
        {failure}
    processes.all_max(0)  # where the other waits for it

run_script(main)
"""


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "failure, told", [("raise UserError('no room')", "error: no room"), ("1 / 0", "DivisionError: ")]
)
def test_a_process_that_fails_takes_the_others_with_it(tmp_path, rank, failure, told):
    """The others wait for it. All end within seconds, and it tells why."""
    (tmp_path / "script.py").write_text(FAILS.format(rank=rank, failure=failure))
    start = time.monotonic()
    done = torchrun(tmp_path / "script.py", env={"PYTHONPATH": str(ROOT)})
    assert done.returncode and time.monotonic() - start < 60
    assert told in done.stderr


def test_losses_are_float32_in_bf16_too():
    net = tiny_unet()
    model = UnifiedModel(GuidanceModel(net, gan_classifier=True))
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.generator_turn(noise, labels)[0] | model.guidance_turn(noise, labels, noise, labels)[0]
    assert len(losses) == 4 and {loss.dtype for loss in losses.values()} == {torch.float32}


@pytest.mark.slow
def test_a_compiled_network_trains_the_same(tmp_path):
    cache = tmp_path / "cache"
    for name, env in (
        ("without", {"CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "empty")}),
        ("compiled", {"TORCHINDUCTOR_CACHE_DIR": str(cache)}),
    ):
        options = dict(step_number=3, compile=True, output_dir=tmp_path / name)
        told = succeed("train_teacher.py", *TEACHER, **options, env=env)
        assert ("--compile: not available here, going on without" in told) == (name == "without")
    without, compiled = ([row["loss"] for row in metrics(tmp_path / name)] for name in ("without", "compiled"))
    assert compiled == pytest.approx(without, rel=1e-4)
    assert len(list(cache.rglob("*.so"))) > 1  # more than the trial
    checkpoint.load_network(tmp_path / "compiled" / "teacher_final.pt")
