"""The promises of docs/reliability.md, with real signals, kills, full disks and damaged files."""

import concurrent.futures
import errno
import fcntl
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import termios
import time
from contextlib import ExitStack, suppress
from unittest.mock import Mock

import pytest
import torch
import yaml
from conftest import ROOT, TINY, TINY_NET, assert_refused, flags, metrics, refuses, run_script, start, succeed, wait_for
from test_scripts import assert_same_run, final, load

import checkpoint
import run
import train_teacher
from support import processes
from support.options import parse_args
from support.script import UserError
from train_teacher import OPTIONS

TEACHER = ["train_teacher.py", *TINY, *TINY_NET]
LONG = dict(step_number=100_000)


def dmd2(runs):
    options = dict(dfake_gen_update_ratio=2, gan_classifier=True, ema_decay=0.5, grad_accum=2)
    return ["train_dmd2.py", *flags(*TINY, teacher_checkpoint=final(runs, "teacher"), **options)]


def stop(process, number=signal.SIGTERM):
    """Sends the signal; returns the output of the process, which must end with that signal's status."""
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    return out, err


def train(folder, *words, **options):
    """A tiny teacher, trained in this process."""
    assert train_teacher.main(flags(*TINY, *TINY_NET, *words, output_dir=folder, **options)) == 0


def steps_in(folder):
    log = folder / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def numbered(folder):
    return sorted(folder.glob("teacher_checkpoint_step_*.pt"), key=lambda file: int(file.stem.split("_")[-1]))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["teacher", "dmd2"])
def test_interrupted_runs_end_like_one_that_was_not(runs, tmp_path, stage):
    """Signals at several points, and each time `latest`; the final checkpoint is the same to the bit."""
    script, *options = [*TEACHER, "--grad_accum", 2] if stage == "teacher" else dmd2(runs)
    options, resumed = flags(*options, step_number=60, log_every=1, save_every=7), {}
    succeed(script, *options, output_dir=tmp_path / "straight")
    folder = tmp_path / "broken"
    for number, after in ((signal.SIGINT, 3), (signal.SIGTERM, 20), (signal.SIGINT, 30)):
        process = start(script, *options, **resumed, output_dir=folder)
        wait_for(lambda after=after: steps_in(folder) >= after, process)
        out, err = stop(process, number)
        told = f"resume with --resume_from_checkpoint {folder}/{stage}_checkpoint_step_"
        assert told in out and "Traceback" not in err
        resumed = dict(resume_from_checkpoint="latest")
    succeed(script, *options, **resumed, output_dir=folder)
    assert_same_run(folder / f"{stage}_final.pt", tmp_path / "straight" / f"{stage}_final.pt")
    assert [row["step"] for row in metrics(folder)] == list(range(1, 61))


def test_a_second_signal_ends_it_at_once(tmp_path):
    """The second comes while the first is handled: the loop waits in a blocked disk write, here a named pipe."""
    folder = tmp_path / "out"
    folder.mkdir()
    process = start(*TEACHER, output_dir=folder, **LONG)
    wait_for((folder / "metrics.jsonl").exists, process)
    time.sleep(1)
    os.mkfifo(folder / "pipe")
    for step in range(1, 3000):  # whatever step comes next, its temporary file is the pipe, which nobody reads
        (folder / f"teacher_checkpoint_step_{step}.pt.tmp").symlink_to(folder / "pipe")
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=5)
    assert process.returncode == 143


def test_a_closed_terminal_stops_with_a_checkpoint(tmp_path):
    """A real one, which then answers every write with an error; the signal may come before or after that."""
    ours, theirs = os.openpty()
    os.set_blocking(ours, False)

    def own_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may themselves run under nohup

    command = [sys.executable, ROOT / TEACHER[0], *flags(*TEACHER[1:], **LONG, output_dir=tmp_path, log_every=1)]
    streams = dict(stdin=theirs, stdout=theirs, stderr=theirs)
    process = subprocess.Popen(command, **streams, start_new_session=True, preexec_fn=own_terminal)
    os.close(theirs)

    def has_trained():
        with suppress(BlockingIOError):
            os.read(ours, 65536)  # a terminal that nobody reads makes writers wait
        return steps_in(tmp_path) > 3

    wait_for(has_trained, process)
    os.close(ours)
    assert process.wait(120) == 128 + signal.SIGHUP
    assert [file.name for file in tmp_path.glob("*.pt")] == [f"teacher_checkpoint_step_{steps_in(tmp_path)}.pt"]


def test_under_nohup_a_closed_terminal_stops_nothing(tmp_path):
    ignore = dict(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process = start(*TEACHER, **LONG, output_dir=tmp_path, log_every=1, **ignore)
    wait_for(lambda: steps_in(tmp_path), process)
    process.send_signal(signal.SIGHUP)
    before = steps_in(tmp_path)
    wait_for(lambda: steps_in(tmp_path) > before + 3, process)
    stop(process)


@pytest.mark.parametrize("how, to", [("later", ""), ("before", " >&-"), ("unbuffered", ""), ("full", " >/dev/full")])
def test_a_closed_standard_output_means_silence(tmp_path, how, to):
    """As with `| head -1`, `>&-` and a log file on a full disk: the training continues to its end."""
    options = dict(output_dir=tmp_path, step_number=9, log_every=1)
    command = [sys.executable, ROOT / TEACHER[0], *flags(*TEACHER[1:], **options)]
    env = {**os.environ, "PYTHONUNBUFFERED": "1" if how == "unbuffered" else ""}
    shell = ["sh", "-c", 'exec "$@"' + to, "sh", *command]
    process = subprocess.Popen(shell, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(120) == 0 and "Traceback" not in err and "Exception" not in err, err
    assert (tmp_path / "teacher_final.pt").exists()


def test_a_command_whose_reader_leaves_ends_quietly():
    process = start("generate.py", "--help")
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == ("", 0)


@pytest.mark.slow
def test_kill_at_random_moments_loses_nothing_saved(tmp_path):
    """Twenty kill -9s, most while a checkpoint is being written; after each, all load and the run goes on."""
    rng, resumed, reached = random.Random(0), {}, 0
    options = flags(*TEACHER[1:], output_dir=tmp_path, step_number=1_000_000, save_every=1, model_channels=64)
    for _ in range(20):
        process = start(TEACHER[0], *options, **resumed)
        before = set(numbered(tmp_path))
        wait_for(lambda before=before: set(numbered(tmp_path)) - before, process)
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.communicate()
        files = numbered(tmp_path)
        assert 1 <= len(files) <= 4  # three are kept, and one more between saving and deleting
        steps = [load(file)["step"] for file in files]
        assert steps[-1] > reached
        reached, resumed = steps[-1], dict(resume_from_checkpoint="latest")
    succeed(TEACHER[0], *options, **resumed, step_number=reached + 1)
    assert not list(tmp_path.glob("*.tmp"))


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1.5 MB, room for two checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", folder]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def assert_stopped(status, err, folder, cause):
    """One line that names a file in the folder and the cause; no traceback."""
    lines = [line for line in err.splitlines() if "error" in line]
    assert status == 2 and len(lines) == 1 and f"{folder}/" in lines[0] and cause in lines[0], err
    assert "Traceback" not in err


def assert_whole(folder):
    """The checkpoints there are whole, and no temporary file is left."""
    assert numbered(folder) and all(load(file)["step"] for file in numbered(folder))
    assert not list(folder.glob("*.tmp"))


def test_file_size_limit_while_saving(tmp_path):
    train(tmp_path, save_every=1, step_number=2)
    options = dict(save_every=1, step_number=5, resume_from_checkpoint="latest", preexec_fn=limit_file_size)
    process = start(*TEACHER, output_dir=tmp_path, **options)
    assert_stopped(process.wait(120), process.stderr.read(), tmp_path, "File too large")
    assert_whole(tmp_path)


def test_full_disk_while_saving(small_disk):
    done = run_script(*TEACHER, output_dir=small_disk, save_every=1, step_number=50, keep_last=50)
    assert_stopped(done.returncode, done.stderr, small_disk, "No space left on device")
    assert_whole(small_disk)


@pytest.mark.parametrize("first", ["log_every", "save_every"])
def test_folder_that_becomes_read_only(small_disk, first):
    """As on a failing disk, whether metrics or a checkpoint are written next."""
    often = dict(log_every=1000, save_every=2000) | {first: 200}
    process = start(*TEACHER, output_dir=small_disk, **LONG, **often, keep_last=1)
    succeeded = small_disk / ("metrics.jsonl" if first == "log_every" else "teacher_checkpoint_step_200.pt")
    wait_for(lambda: succeeded.exists() and succeeded.stat().st_size, process)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    _, err = process.communicate(timeout=120)
    assert_stopped(process.returncode, err, small_disk, "Read-only file system")


def test_output_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("a file where a folder should be")
    refuses("Not a directory", *TEACHER, output_dir=tmp_path / "file" / "out")


def test_latest_falls_back_to_the_newest_whole_checkpoint(runs, tmp_path):
    for step in (2, 4):
        content = (runs / "teacher" / f"teacher_checkpoint_step_{step}.pt").read_bytes()
        kept = content[: len(content) // 2 if step == 4 else None]
        (tmp_path / f"teacher_checkpoint_step_{step}.pt").write_bytes(kept)
    done = run_script(*TEACHER, output_dir=tmp_path, resume_from_checkpoint="latest", log_every=1)
    assert done.returncode == 0 and "teacher_checkpoint_step_4.pt: damaged" in done.stdout
    assert [row["step"] for row in metrics(tmp_path)] == [3, 4]


def test_steps_that_are_not_finite_are_skipped_and_end_the_run(tmp_path):
    """A learning rate of 1e30 makes real infinities. Only finite values reach a checkpoint."""
    options = dict(lr=1e30, lr_warmup_steps=0, step_number=50, max_bad_steps=5, keep_last=50, save_every=1, log_every=1)
    done = run_script(*TEACHER, output_dir=tmp_path, **options)
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode == 2 and "steps in a row had gradients that are not finite" in line
    assert "lower the learning rate" in line
    state = load(numbered(tmp_path)[-1])
    for key in ("model_state_dict", "ema_state_dict"):
        assert all(value.isfinite().all() for value in state[key].values())
    for moments in state["optimizer_state_dict"]["state"].values():
        assert all(value.isfinite().all() for value in moments.values())
    assert state["step"] < 10 and metrics(tmp_path)[-1]["grad_norm"] is None


def test_retention_keeps_the_newest(tmp_path):
    train(tmp_path, step_number=9, save_every=1, keep_last=2)
    kept = {file.name for file in tmp_path.glob("*.pt")}
    assert kept == {"teacher_checkpoint_step_8.pt", "teacher_checkpoint_step_9.pt", "teacher_final.pt"}


def test_a_finished_run_stays_as_it_is(tmp_path):
    """Whatever options it is called with again: they would become those of its checkpoint and its config.yaml."""
    train(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    train(tmp_path, resume_from_checkpoint="latest", step_number=2, lr=5)
    assert {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before
    (tmp_path / "teacher_final.pt").rename(tmp_path / "teacher_checkpoint_step_4.pt")  # as after a kill at the end
    train(tmp_path, resume_from_checkpoint="latest")
    assert load(tmp_path / "teacher_final.pt")["step"] == 4


def test_going_back_sets_the_later_checkpoints_aside(tmp_path):
    """Twice resumed from step 2 in a folder with later steps, a run keeps its own; `latest` ignores the others."""
    train(tmp_path, save_every=2, step_number=6, keep_last=9)
    other = tmp_path / "dmd2_checkpoint_step_1.pt"
    other.write_bytes(b"another stage's file")
    second, fourth = (tmp_path / f"teacher_checkpoint_step_{step}.pt" for step in (2, 4))
    for lr, ending in ((2e-4, ".old"), (3e-4, ".old2")):
        content = fourth.read_bytes()
        train(tmp_path, save_every=2, step_number=4, keep_last=2, lr=lr, resume_from_checkpoint=second)
        assert (tmp_path / f"{fourth.name}{ending}").read_bytes() == content
    ours = {second.name, fourth.name, "teacher_final.pt"}
    aside = {fourth.name, "teacher_checkpoint_step_6.pt", "teacher_final.pt"}
    aside = {f"{name}.old" for name in aside} | {f"{fourth.name}.old2", "teacher_final.pt.old2"}
    assert {file.name for file in tmp_path.glob("*.pt*")} == ours | aside | {other.name}
    assert load(tmp_path / "teacher_final.pt")["step"] == 4


def test_a_run_does_not_go_on_in_the_folder_of_another(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    train(one, log_every=1)
    train(two, log_every=1)
    before = {file: file.read_bytes() for file in two.iterdir() if file.is_file()}
    resume = dict(resume_from_checkpoint=one / "teacher_final.pt", step_number=6)
    told = f"--output_dir {two} holds another run (teacher_final.pt)"
    refuses(told, *TEACHER, **resume, output_dir=two)
    refuses(told, *TEACHER, output_dir=two, dataset="folder", data_dir="not read")
    assert {file: file.read_bytes() for file in two.iterdir() if file.is_file()} == before
    train(tmp_path / "three", **resume)


def test_checkpoints_may_be_links_to_another_disk(tmp_path):
    train(tmp_path / "run")
    final = tmp_path / "run" / "teacher_final.pt"
    final.symlink_to(final.rename(tmp_path / "large.pt"))
    train(tmp_path / "run", resume_from_checkpoint="latest", step_number=6)
    assert load(final)["step"] == 6


def test_the_users_own_config_is_kept(tmp_path):
    content = "# my notes\nlr: 3e-4\n"
    config = tmp_path / "config.yaml"
    config.write_text(content)
    train(tmp_path, config=config)
    assert (tmp_path / "config.yaml.old").read_text() == content
    assert yaml.safe_load(config.read_text())["lr"] == 3e-4
    train(tmp_path, config=config, overwrite=True, lr=1e-4)  # now it is the run's
    assert [file.name for file in tmp_path.glob("config.yaml*.old*")] == ["config.yaml.old"]


def test_main_runs_in_a_thread_and_gives_the_signals_back(tmp_path):
    """In a thread Python does not let it handle signals; a notebook has handlers of its own."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        pool.submit(train, tmp_path / "thread").result()
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    train(tmp_path / "notebook")
    assert [signal.getsignal(number) for number in numbers] == before


def test_an_error_in_the_loop_gives_folder_and_signals_back(tmp_path, monkeypatch):
    """In a notebook the next call may train in the same folder, although the error is still held there."""
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError) as error:
        patch.setattr(run.Run, "save_if_due", lambda self: 1 / 0)
        train(tmp_path)
    assert signal.getsignal(signal.SIGTERM) == before and error.traceback
    train(tmp_path)


def test_a_doubly_forwarded_signal_counts_once(monkeypatch):
    """torchrun and a scheduler may both forward it. What the other processes say counts too."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with ExitStack() as at_exit:
        stop = run.Stop(at_exit)
        assert not stop.is_due()
        monkeypatch.setattr(processes, "all_max", lambda reason: 143)
        assert stop.is_due() and stop.exit_status == 143
        stop.receive(signal.SIGTERM, None)
        stop.receive(signal.SIGTERM, None)
        assert not ended
        stop.since -= 2
        stop.receive(signal.SIGTERM, None)
        assert ended == [143]


def test_one_folder_holds_one_run(runs, tmp_path):
    """A second process is refused while the first trains; a later one has to choose: resume or start a new run."""
    first = start(*TEACHER, output_dir=tmp_path, **LONG, save_every=5)
    wait_for(lambda: list(tmp_path.glob("*.pt")), first)
    assert_refused(run_script(*TEACHER, output_dir=tmp_path, overwrite=True), "another process trains there")
    stop(first, signal.SIGINT)

    for script in (TEACHER, dmd2(runs)):
        assert_refused(run_script(*script, output_dir=tmp_path), "holds another run")
    train(tmp_path, overwrite=True, log_every=1)
    assert [file.name for file in tmp_path.glob("*.pt")] == ["teacher_final.pt"] and steps_in(tmp_path) == 4


def test_a_run_that_ends_meanwhile_is_not_overrun(runs, tmp_path):
    """It takes and leaves the folder after another has looked into it, and before that locks it."""
    later = run.Run(parse_args(OPTIONS, "", flags(output_dir=tmp_path)), OPTIONS, "teacher")
    shutil.copy(runs / "teacher" / "teacher_final.pt", tmp_path)
    with ExitStack() as at_exit, pytest.raises(UserError, match="another run has begun there"):
        later.take_folder(at_exit)
    assert (tmp_path / "teacher_final.pt").exists()


@pytest.mark.parametrize("how", ["not logged in", "server down", "not installed"])
def test_training_goes_on_without_weights_and_biases(tmp_path, how):
    env = {"WANDB_API_KEY": "x" * 40 if how == "server down" else "", "WANDB_BASE_URL": "http://127.0.0.1:9"}
    env |= {"WANDB_INIT_TIMEOUT": "3", "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    if how == "not installed":
        (tmp_path / "wandb.py").write_text("raise ImportError('No module named wandb')")
        env["PYTHONPATH"] = str(tmp_path)
    out = succeed(*TEACHER, output_dir=tmp_path / "out", wandb=True, wandb_dir=tmp_path / "w", env=env)
    assert out.count("Weights & Biases is now off, training continues") == 1
    assert (tmp_path / "out" / "teacher_final.pt").exists()


def test_same_seed_same_run_and_the_stored_config_repeats_it(runs, tmp_path):
    """From `config.yaml` alone, in another folder: the same weights; another seed: others."""
    config = runs / "teacher" / "config.yaml"
    assert yaml.safe_load(config.read_text())["batch_size"] == 16
    succeed("train_teacher.py", config=config, output_dir=tmp_path / "same")
    succeed("train_teacher.py", config=config, output_dir=tmp_path / "other", seed=1)
    folders = runs / "teacher", tmp_path / "same", tmp_path / "other"
    first, same, other = (load(folder / "teacher_final.pt") for folder in folders)
    for name, tensor in first["model_state_dict"].items():
        assert torch.equal(same["model_state_dict"][name], tensor)
    assert not torch.equal(other["model_state_dict"]["conv_in.weight"], first["model_state_dict"]["conv_in.weight"])
    assert first["versions"]["torch"] == torch.__version__ and {"python", "commit"} < first["versions"].keys()


def test_wandb_run_is_continued(tmp_path):
    """The id of the run is in the checkpoint, and a resumed run uses it, even after a part without W&B.

    W&B drops what is sent for earlier steps than it has. So a run that branches off, in any folder, gets a new id.
    """
    script, *options = *TEACHER, *flags(wandb_mode="offline", wandb_dir=tmp_path / "w", save_every=2)
    out, branch = tmp_path / "out", tmp_path / "branch"
    latest, earlier = "latest", out / "teacher_checkpoint_step_6.pt"

    def go_on(step, source, wandb=True, folder=out):
        resume = dict(resume_from_checkpoint=source) if source else {}
        succeed(script, *options, output_dir=folder, wandb=wandb, step_number=step, **resume)

    go_on(4, None)
    go_on(6, latest)
    ids = {load(file)["wandb_run_id"] for file in out.glob("*.pt")}
    folders = list((tmp_path / "w").glob("wandb/offline-run-*"))
    assert len(ids) == 1 and len(folders) == 2 and all(folder.name.endswith(next(iter(ids))) for folder in folders)
    go_on(8, latest, wandb=False)
    assert {load(out / "teacher_final.pt")["wandb_run_id"]} == ids

    go_on(8, earlier, folder=branch)
    go_on(8, earlier)
    ids |= {load(folder / "teacher_final.pt")["wandb_run_id"] for folder in (branch, out)}
    assert len(ids) == 3


NO_MEMORY = ["out of memory", "allocate", "--grad_accum"]
ERRORS = [
    ("1 / 0", 1, ["Traceback", "ZeroDivisionError"]),
    ("raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')", 2, NO_MEMORY),
    ("torch.empty(10**13)", 2, NO_MEMORY),
    ("raise PermissionError(13, 'Permission denied', 'a/b')", 2, ["a/b: Permission denied"]),
]


@pytest.mark.parametrize("error, status, told", ERRORS)
def test_bugs_show_their_traceback_and_lack_of_memory_what_to_change(tmp_path, error, status, told):
    """Only user mistakes, and a machine that is too small or forbids something, get one line."""
    code = f"import torch\nfrom support.script import run_script\n\ndef main():\n    {error}\n\nrun_script(main)\n"
    (tmp_path / "script.py").write_text(code)
    done = run_script(tmp_path / "script.py", env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == status and all(word in done.stderr for word in told), done.stderr
    assert (len(done.stderr.splitlines()) == 1) == (status == 2)


def test_auto_resumes_or_starts_afresh_and_says_which(tmp_path):
    """For a job that a scheduler starts again and again; SIGUSR1, its warning, saves."""
    options = flags(*TEACHER[1:], output_dir=tmp_path, log_every=1, resume_from_checkpoint="auto")
    process = start(TEACHER[0], *options, **LONG)
    wait_for(lambda: steps_in(tmp_path) > 2, process)
    out, _ = stop(process, signal.SIGUSR1)
    assert "auto: a new run in" in out
    done = steps_in(tmp_path)
    assert f"going on from {tmp_path}/teacher_" in succeed(TEACHER[0], *options, step_number=done + 1)
    assert [row["step"] for row in metrics(tmp_path)] == list(range(1, done + 2))


@pytest.mark.parametrize("damage", ['{"step": 3, "lo', "\0" * 40 + "\n", "[1]\n", '{"step": "3"}\n'])
def test_damaged_lines_of_metrics_are_dropped(tmp_path, damage):
    """A run goes on from metrics with an incomplete line, as after a kill, or with zeros, as after a power cut."""
    train(tmp_path, log_every=1, step_number=2)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(damage)
    train(tmp_path, log_every=1, step_number=4, resume_from_checkpoint="latest")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["resume_from_checkpoint"] is None
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr(run.fcntl, "flock", lambda *a: (_ for _ in ()).throw(OSError(error, os.strerror(error))))
    train(tmp_path)
    assert capsys.readouterr().out.count("cannot be locked") == 1 and (tmp_path / "teacher_final.pt").exists()


def test_a_folder_that_cannot_be_flushed_does_not_end_a_run(tmp_path, monkeypatch):
    """Some network file systems refuse it for folders. For a file it must not fail silently."""
    fsync = os.fsync

    def refuse(descriptor, folders):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == folders:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", lambda descriptor: refuse(descriptor, True))
    checkpoint.save(tmp_path / "x.pt", {"a": 1})
    monkeypatch.setattr(os, "fsync", lambda descriptor: refuse(descriptor, False))
    with pytest.raises(UserError, match="Invalid argument; an earlier file of this name is intact"):
        checkpoint.save(tmp_path / "x.pt", {"a": 2})
    assert load(tmp_path / "x.pt") == {"a": 1} and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("given", [[], ["--wandb_mode", "offline"]])
def test_wandbs_environment_beats_our_defaults(tmp_path, monkeypatch, given):
    """And a flag beats it. Without a flag the mode is None, for which W&B reads WANDB_MODE itself."""
    monkeypatch.setitem(sys.modules, "wandb", wandb := Mock(**{"init.return_value.id": "a"}))
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    train(tmp_path / "out", *given, wandb=True, wandb_dir=tmp_path / "w")
    seen = [wandb.init.call_args.kwargs[name] for name in ("project", "mode", "dir")]
    assert seen == ["theirs", given[1] if given else None, str(tmp_path / "w")]
    assert "WANDB_DATA_DIR" not in os.environ  # which is for this run alone
