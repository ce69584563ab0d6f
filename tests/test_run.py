"""The promises of docs/reliability.md, with real signals, kills, full disks and damaged files."""

import concurrent.futures
import errno
import fcntl
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import termios
import time
import types
from contextlib import suppress

import pytest
import torch
import yaml
from conftest import ROOT, TINY, TINY_NET, metrics, run_script, succeed, write_images
from test_options import assert_refused
from test_scripts import assert_same_run, load

import checkpoint
import run
import train_teacher
from sampling import class_noise, one_step_sampler
from support import processes
from support.script import UserError

TEACHER = ["train_teacher.py", *TINY, *TINY_NET]


def dmd2(runs):
    options = ["--dfake_gen_update_ratio", 2, "--gan_classifier", "--ema_decay", 0.5, "--grad_accum", 2]
    return ["train_dmd2.py", *TINY, "--teacher_checkpoint", runs / "teacher" / "teacher_final.pt", *options]


def start(script, *arguments, **options):
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["teacher", "dmd2"])
def test_interrupted_runs_end_like_one_that_was_not(runs, tmp_path, stage):
    """Signals at several points, and each time `latest`; the final checkpoint is the same to the bit."""
    base = [*TEACHER, "--grad_accum", 2] if stage == "teacher" else dmd2(runs)
    arguments = [*base, "--step_number", 60, "--log_every", 1, "--save_every", 7]
    succeed(*arguments, "--output_dir", tmp_path / "straight")
    folder, resumed = tmp_path / "broken", []
    for number, status, after in ((signal.SIGINT, 130, 3), (signal.SIGTERM, 143, 20), (signal.SIGINT, 130, 30)):
        process = start(*arguments, *resumed, "--output_dir", folder)
        log = folder / "metrics.jsonl"
        wait_for(lambda log=log, after=after: log.exists() and len(log.read_text().splitlines()) >= after, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
        assert process.returncode == status, err
        assert (
            f"resume with --resume_from_checkpoint {folder}/{stage}_checkpoint_step_" in out and "Traceback" not in err
        )
        resumed = ["--resume_from_checkpoint", "latest"]
    succeed(*arguments, *resumed, "--output_dir", folder)
    assert_same_run(folder / f"{stage}_final.pt", tmp_path / "straight" / f"{stage}_final.pt")
    assert [row["step"] for row in metrics(folder)] == list(range(1, 61))


def test_a_second_signal_ends_it_at_once(tmp_path):
    """The second comes while the first is handled: the loop waits in a blocked disk write, here a named pipe."""
    folder = tmp_path / "out"
    folder.mkdir()
    process = start(*TEACHER, "--step_number", 100_000, "--output_dir", folder)
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


def steps_in(folder):
    log = folder / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_a_closed_terminal_stops_with_a_checkpoint(tmp_path):
    """A real one, which then answers every write with an error; the signal may come before or after that."""
    ours, theirs = os.openpty()
    os.set_blocking(ours, False)
    arguments = [*TEACHER[1:], "--step_number", 100_000, "--output_dir", tmp_path, "--log_every", 1]

    def own_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may themselves run under nohup

    process = subprocess.Popen(
        [sys.executable, str(ROOT / TEACHER[0]), *map(str, arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=own_terminal,
    )
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
    arguments = [*TEACHER, "--step_number", 100_000, "--output_dir", tmp_path, "--log_every", 1]
    process = start(*arguments, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for(lambda: steps_in(tmp_path), process)
    process.send_signal(signal.SIGHUP)
    before = steps_in(tmp_path)
    wait_for(lambda: steps_in(tmp_path) > before + 3, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143


@pytest.mark.parametrize("how", ["closed later", "closed before", "unbuffered"])
def test_a_closed_standard_output_means_silence(tmp_path, how):
    """As with `| head -1` and `>&-`: the training continues to its end."""
    command = [
        sys.executable,
        ROOT / TEACHER[0],
        *TEACHER[1:],
        "--step_number",
        12,
        "--output_dir",
        tmp_path,
        "--log_every",
        1,
    ]
    shell = ["sh", "-c", 'exec "$@"' + " >&-" * (how == "closed before"), "sh", *map(str, command)]
    env = {**os.environ, "PYTHONUNBUFFERED": "1" if how == "unbuffered" else ""}
    process = subprocess.Popen(shell, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(120) == 0 and "Traceback" not in err and "Exception" not in err, err
    assert (tmp_path / "teacher_final.pt").exists()


def test_a_command_whose_reader_leaves_ends_quietly():
    process = start("generate.py", "--help", bufsize=0)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == ("", 0)


def test_max_minutes_stops_with_a_checkpoint(tmp_path):
    arguments = [*TEACHER, "--output_dir", tmp_path, "--step_number", 1_000_000, "--max_minutes", 0.03]
    assert f"resume with --resume_from_checkpoint {tmp_path}/teacher_checkpoint_step_" in succeed(*arguments)
    assert (
        len(list(tmp_path.glob("teacher_checkpoint_step_*.pt"))) == 1 and not (tmp_path / "teacher_final.pt").exists()
    )


@pytest.mark.slow
def test_kill_at_random_moments_loses_nothing_saved(tmp_path):
    """Twenty kill -9s, most while a checkpoint is being written; after each, all load and the run goes on."""
    rng, resumed, reached = random.Random(0), [], 0
    arguments = [
        *TEACHER,
        "--output_dir",
        tmp_path,
        "--step_number",
        1_000_000,
        "--save_every",
        1,
        "--model_channels",
        64,
    ]
    for _ in range(20):
        process = start(*arguments, *resumed)
        before = set(tmp_path.glob("teacher_checkpoint_step_*.pt"))
        wait_for(lambda before=before: set(tmp_path.glob("teacher_checkpoint_step_*.pt")) - before, process)
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.communicate()
        files = sorted(tmp_path.glob("teacher_checkpoint_step_*.pt"), key=lambda file: int(file.stem.split("_")[-1]))
        assert 1 <= len(files) <= 4  # three are kept, and one more between saving and deleting
        steps = [load(file)["step"] for file in files]
        assert steps[-1] > reached
        reached, resumed = steps[-1], ["--resume_from_checkpoint", "latest"]
    succeed(*arguments, *resumed, "--step_number", reached + 1)
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


def assert_stopped(done, folder, cause):
    """One line that names a file in the folder and the cause; no temporary file; the checkpoints there are whole."""
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode == 2 and len(lines) == 1 and f"{folder}/" in lines[0] and cause in lines[0], done.stderr
    assert "Traceback" not in done.stderr
    files = list(folder.glob("teacher_checkpoint_step_*.pt"))
    assert files and all(load(file)["step"] for file in files)


def test_file_size_limit_while_saving(tmp_path):
    arguments = [*TEACHER, "--output_dir", tmp_path, "--save_every", 1]
    succeed(*arguments, "--step_number", 2)
    process = start(*arguments, "--step_number", 5, "--resume_from_checkpoint", "latest", preexec_fn=limit_file_size)
    out, err = process.communicate(timeout=120)
    assert_stopped(subprocess.CompletedProcess([], process.returncode, out, err), tmp_path, "File too large")
    assert not list(tmp_path.glob("*.tmp"))


def test_full_disk_while_saving(small_disk):
    arguments = ["--output_dir", small_disk, "--save_every", 1, "--step_number", 50, "--keep_last", 50]
    assert_stopped(run_script(*TEACHER, *arguments), small_disk, "No space left on device")
    assert not list(small_disk.glob("*.tmp"))


@pytest.mark.parametrize("first", ["--log_every", "--save_every"])
def test_folder_that_becomes_read_only(small_disk, first):
    """As on a failing disk, whether metrics or a checkpoint are written next."""
    often = {"--log_every": 1000, "--save_every": 2000} | {first: 200}
    arguments = [str(word) for pair in often.items() for word in pair]
    process = start(*TEACHER, "--output_dir", small_disk, "--step_number", 100_000, *arguments, "--keep_last", 1)
    succeeded = small_disk / ("metrics.jsonl" if first == "--log_every" else "teacher_checkpoint_step_200.pt")
    wait_for(lambda: succeeded.exists() and succeeded.stat().st_size, process)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    _, err = process.communicate(timeout=120)
    lines = [line for line in err.splitlines() if "error" in line]
    assert (
        process.returncode == 2
        and len(lines) == 1
        and f"{small_disk}/" in lines[0]
        and "Read-only file system" in lines[0]
    ), err


def test_output_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("a file where a folder should be")
    done = run_script(*TEACHER, "--output_dir", tmp_path / "file" / "out")
    assert_refused(done, "Not a directory")


def test_latest_falls_back_to_the_newest_whole_checkpoint(runs, tmp_path):
    for step in (2, 4):
        content = (runs / "teacher" / f"teacher_checkpoint_step_{step}.pt").read_bytes()
        (tmp_path / f"teacher_checkpoint_step_{step}.pt").write_bytes(
            content[: len(content) // 2 if step == 4 else None]
        )
    done = run_script(*TEACHER, "--output_dir", tmp_path, "--resume_from_checkpoint", "latest", "--log_every", 1)
    assert done.returncode == 0 and "teacher_checkpoint_step_4.pt: damaged" in done.stderr
    assert [row["step"] for row in metrics(tmp_path)] == [3, 4]


def test_steps_that_are_not_finite_are_skipped_and_end_the_run(tmp_path):
    """A learning rate of 1e30 makes real infinities. Only finite values reach a checkpoint."""
    arguments = [*TEACHER, "--output_dir", tmp_path, "--log_every", 1, "--save_every", 1, "--lr_warmup_steps", 0]
    done = run_script(*arguments, "--lr", 1e30, "--step_number", 50, "--max_bad_steps", 5, "--keep_last", 50)
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode == 2 and "steps in a row had gradients that are not finite" in line
    assert "lower the learning rate" in line
    last = max(tmp_path.glob("*.pt"), key=lambda file: int(file.stem.split("_")[-1]))
    state = load(last)
    for key in ("model_state_dict", "ema_state_dict"):
        assert all(value.isfinite().all() for value in state[key].values())
    for moments in state["optimizer_state_dict"]["state"].values():
        assert all(value.isfinite().all() for value in moments.values())
    assert state["step"] < 10 and metrics(tmp_path)[-1]["grad_norm"] is None


def test_retention_keeps_the_newest_and_every_mth(tmp_path):
    succeed(
        *TEACHER, "--output_dir", tmp_path, "--step_number", 9, "--save_every", 1, "--keep_last", 2, "--keep_every", 4
    )
    kept = {file.name for file in tmp_path.glob("*.pt")}
    assert kept == {f"teacher_checkpoint_step_{step}.pt" for step in (4, 8, 9)} | {"teacher_final.pt"}


def test_going_back_sets_the_later_checkpoints_aside(tmp_path):
    """A run resumed from step 2 in a folder with steps 4 and 6 keeps its own; `latest` ignores the others."""
    arguments = [*TEACHER, "--output_dir", tmp_path, "--save_every", 2, "--keep_last", 2]
    succeed(*arguments, "--step_number", 6, "--keep_last", 9)
    other = tmp_path / "dmd2_checkpoint_step_1.pt"
    other.write_bytes(b"another stage's file")
    succeed(*arguments, "--step_number", 4, "--resume_from_checkpoint", tmp_path / "teacher_checkpoint_step_2.pt")
    names = {file.name for file in tmp_path.glob("*.pt*")} - {other.name}
    assert names == {f"teacher_{what}" for what in ("checkpoint_step_2.pt", "checkpoint_step_4.pt", "final.pt")} | {
        f"teacher_{what}.old" for what in ("checkpoint_step_4.pt", "checkpoint_step_6.pt", "final.pt")
    }
    assert other.exists() and load(tmp_path / "teacher_final.pt")["step"] == 4


def test_going_back_twice_keeps_both_continuations(tmp_path):
    arguments = [*TEACHER, "--output_dir", tmp_path, "--save_every", 1, "--keep_last", 9]
    succeed(*arguments, "--step_number", 2)
    first = tmp_path / "teacher_checkpoint_step_1.pt"
    for lr, name in ((2e-4, "teacher_checkpoint_step_2.pt.old"), (3e-4, "teacher_checkpoint_step_2.pt.old2")):
        content = (tmp_path / "teacher_checkpoint_step_2.pt").read_bytes()
        succeed(*arguments, "--step_number", 2, "--resume_from_checkpoint", first, "--lr", lr)
        assert (tmp_path / name).read_bytes() == content
    assert not list(tmp_path.glob("*.old3"))


def test_a_run_does_not_go_on_in_the_folder_of_another(tmp_path):
    for name in ("one", "two"):
        succeed(*TEACHER, "--output_dir", tmp_path / name, "--log_every", 1)
    before = {file: file.read_bytes() for file in (tmp_path / "two").iterdir() if file.is_file()}
    resume = ["--resume_from_checkpoint", tmp_path / "one" / "teacher_final.pt", "--step_number", 6]
    done = run_script(*TEACHER, *resume, "--output_dir", tmp_path / "two")
    assert_refused(
        done, f"--output_dir {tmp_path / 'two'} holds another run (teacher_final.pt), not that of {tmp_path / 'one'}"
    )
    assert {file: file.read_bytes() for file in (tmp_path / "two").iterdir() if file.is_file()} == before
    succeed(*TEACHER, *resume, "--output_dir", tmp_path / "three")


def test_checkpoints_may_be_links_to_another_disk(tmp_path):
    succeed(*TEACHER, "--output_dir", tmp_path / "run")
    final = tmp_path / "run" / "teacher_final.pt"
    final.symlink_to(final.rename(tmp_path / "large.pt"))
    succeed(*TEACHER, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "latest", "--step_number", 6)
    assert load(final)["step"] == 6


def test_the_users_own_config_is_kept(tmp_path):
    content = "# my notes\nlr: 3e-4\n"
    (tmp_path / "config.yaml").write_text(content)
    arguments = [*TEACHER, "--config", tmp_path / "config.yaml", "--output_dir", tmp_path]
    succeed(*arguments)
    assert (tmp_path / "config.yaml.old").read_text() == content
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["lr"] == 3e-4
    succeed(*arguments, "--overwrite", "--lr", "1e-4")  # now it is the run's
    assert [file.name for file in tmp_path.glob("config.yaml*.old*")] == ["config.yaml.old"]


def test_main_runs_in_a_thread(tmp_path):
    """Where Python does not let it handle signals."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        assert pool.submit(train_teacher.main, [*TINY, *TINY_NET, "--output_dir", str(tmp_path)]).result() == 0


def test_in_a_notebook_the_signals_are_given_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert train_teacher.main([*TINY, *TINY_NET, "--output_dir", str(tmp_path)]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_a_doubly_forwarded_signal_counts_once(monkeypatch):
    """torchrun and a scheduler may both forward it. What the other processes say counts too."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    stop = run.Stop()
    try:
        assert not stop.due
        monkeypatch.setattr(processes, "all_max", lambda reason: 143)
        assert stop.due and stop.exit_status == 143
        stop.receive(signal.SIGTERM, None)
        stop.receive(signal.SIGTERM, None)
        assert not ended
        stop.since -= 2
        stop.receive(signal.SIGTERM, None)
        assert ended == [143]
    finally:
        stop.end()


def test_one_folder_holds_one_run(runs, tmp_path):
    """A second process is refused while the first trains; a later one has to choose: resume or start a new run."""
    first = start(*TEACHER, "--output_dir", tmp_path, "--step_number", 100_000, "--save_every", 5)
    wait_for(lambda: list(tmp_path.glob("*.pt")), first)
    assert_refused(run_script(*TEACHER, "--output_dir", tmp_path, "--overwrite"), "another process trains there")
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=120)
    assert first.returncode == 130

    for script in (TEACHER, dmd2(runs)):
        assert_refused(run_script(*script, "--output_dir", tmp_path), "holds another run")
    succeed(*TEACHER, "--output_dir", tmp_path, "--overwrite", "--log_every", 1)
    assert [file.name for file in tmp_path.glob("*.pt")] == ["teacher_final.pt"] and len(metrics(tmp_path)) == 4


@pytest.mark.parametrize("how", ["not logged in", "server down", "not installed"])
def test_training_goes_on_without_weights_and_biases(tmp_path, how):
    env = {
        "WANDB_API_KEY": "x" * 40 if how == "server down" else "",
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_INIT_TIMEOUT": "3",
    }
    env |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    if how == "not installed":
        (tmp_path / "wandb.py").write_text("raise ImportError('No module named wandb')")
        env["PYTHONPATH"] = str(tmp_path)
    out = succeed(*TEACHER, "--output_dir", tmp_path / "out", "--wandb", "--wandb_dir", tmp_path / "w", env=env)
    assert out.count("Weights & Biases is now off, training continues") == 1
    assert (tmp_path / "out" / "teacher_final.pt").exists()


def test_same_seed_same_run_and_the_stored_config_repeats_it(runs, tmp_path):
    """From `config.yaml` alone, in another folder: the same weights; another seed: others."""
    config = runs / "teacher" / "config.yaml"
    assert yaml.safe_load(config.read_text())["batch_size"] == 16
    for name, extra in (("same", []), ("other", ["--seed", 1])):
        succeed("train_teacher.py", "--config", config, "--output_dir", tmp_path / name, *extra)
    first, same, other = (
        load(f / "teacher_final.pt") for f in (runs / "teacher", tmp_path / "same", tmp_path / "other")
    )
    for name, tensor in first["model_state_dict"].items():
        assert torch.equal(same["model_state_dict"][name], tensor)
    assert not torch.equal(other["model_state_dict"]["conv_in.weight"], first["model_state_dict"]["conv_in.weight"])
    assert first["versions"]["torch"] == torch.__version__ and {"python", "commit"} < first["versions"].keys()


def test_another_thread_count_gives_the_same_images(runs):
    net, outputs, threads = checkpoint.load_network(runs / "dmd2" / "dmd2_final.pt"), [], torch.get_num_threads()
    for number in (1, 4):
        torch.set_num_threads(number)
        outputs.append(one_step_sampler(net, *class_noise(range(10), 8, (1, 8, 8), seed=0), 80.0))
    torch.set_num_threads(threads)
    assert ((outputs[0] - outputs[1]).norm() / outputs[0].norm()) < 1e-4


def test_wandb_run_is_continued(tmp_path):
    """The id of the run is in the checkpoint, and a resumed run uses it, even after a part without W&B.

    W&B drops what is sent for earlier steps than it has. So a run that branches off, in any folder, gets a new id.
    """
    flags = ["--wandb", "--wandb_mode", "offline", "--wandb_dir", tmp_path / "w"]
    flags += ["--output_dir", tmp_path / "out", "--save_every", 2]
    succeed(*TEACHER, *flags)
    succeed(*TEACHER, *flags, "--step_number", 6, "--resume_from_checkpoint", "latest")
    ids = {load(file)["wandb_run_id"] for file in (tmp_path / "out").glob("*.pt")}
    folders = list((tmp_path / "w").glob("wandb/offline-run-*"))
    assert len(ids) == 1 and len(folders) == 2 and all(folder.name.endswith(next(iter(ids))) for folder in folders)
    succeed(*TEACHER, *flags, "--no-wandb", "--step_number", 8, "--resume_from_checkpoint", "latest")
    assert {load(tmp_path / "out" / "teacher_final.pt")["wandb_run_id"]} == ids

    earlier = tmp_path / "out" / "teacher_checkpoint_step_6.pt"
    succeed(
        *TEACHER, *flags, "--step_number", 8, "--resume_from_checkpoint", earlier, "--output_dir", tmp_path / "branch"
    )
    succeed(*TEACHER, *flags, "--step_number", 8, "--resume_from_checkpoint", earlier)
    ids |= {load(tmp_path / folder / "teacher_final.pt")["wandb_run_id"] for folder in ("branch", "out")}
    assert len(ids) == 3


def test_bugs_show_their_traceback(tmp_path):
    """Only user mistakes get one line: an unexpected error is shown with its traceback and exit status 1."""
    (tmp_path / "sitecustomize.py").write_text("from support import options\noptions.parse_args = lambda *a: 1 / 0\n")
    done = run_script("generate.py", env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert done.returncode == 1 and "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr


OUT_OF_MEMORY = ["raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')", "torch.empty(10**13)"]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_is_one_line_that_says_what_to_change(tmp_path, error):
    code = f"import torch\nfrom support.script import run_script\n\ndef main():\n    {error}\n\nrun_script(main)\n"
    (tmp_path / "script.py").write_text(code)
    done = run_script(tmp_path / "script.py", env={"PYTHONPATH": str(ROOT)})
    assert_refused(done, "--grad_accum")
    assert "out of memory" in done.stderr and "allocate" in done.stderr


def test_auto_resumes_or_starts_afresh_and_says_which(tmp_path):
    """For a job that a scheduler starts again and again; SIGUSR1, its warning, saves."""
    arguments = [*TEACHER, "--output_dir", tmp_path, "--log_every", 1, "--resume_from_checkpoint", "auto"]
    process = start(*arguments, "--step_number", 100_000)
    wait_for(lambda: steps_in(tmp_path) > 2, process)
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGUSR1 and "auto: a new run in" in out, err
    done = steps_in(tmp_path)
    assert "auto: the newest in" in succeed(*arguments, "--step_number", done + 1)
    assert [row["step"] for row in metrics(tmp_path)] == list(range(1, done + 2))


@pytest.mark.parametrize("damage", ['{"step": 3, "lo', "\0" * 40 + "\n", "[1]\n", '{"step": "3"}\n'])
def test_damaged_lines_of_metrics_are_dropped(tmp_path, damage):
    """A run goes on from metrics with an incomplete line, as after a kill, or with zeros, as after a power cut."""
    write_images(tmp_path / "set", each=8, size=8)
    arguments = [
        "train_teacher.py",
        *TINY_NET,
        "--dataset",
        "folder",
        "--data_dir",
        tmp_path / "set",
        "--batch_size",
        4,
    ]
    arguments += ["--output_dir", tmp_path / "out", "--log_every", 1]
    succeed(*arguments, "--step_number", 2)
    with open(tmp_path / "out" / "metrics.jsonl", "a") as file:
        file.write(damage)
    succeed(*arguments, "--step_number", 4, "--resume_from_checkpoint", "latest")
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["resume_from_checkpoint"] is None
    assert [row["step"] for row in metrics(tmp_path / "out")] == [1, 2, 3, 4]


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr(run.fcntl, "flock", lambda *a: (_ for _ in ()).throw(OSError(error, os.strerror(error))))
    assert train_teacher.main([*TINY, *TINY_NET, "--output_dir", str(tmp_path)]) == 0
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
    """And a flag beats it: WANDB_MODE=disabled keeps everything on this machine, unless a mode was asked for."""
    seen = {}
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **options: seen.update(options) or types.SimpleNamespace(id="a", log=print, finish=print)
    wandb.Settings = dict
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    options = ["--wandb", "--wandb_dir", str(tmp_path / "w"), *given]
    train_teacher.main([*TINY, *TINY_NET, "--output_dir", str(tmp_path / "out"), *options])
    assert "project" not in seen and seen.get("mode") == (given[1] if given else None)
    assert seen["dir"] == str(tmp_path / "w")
