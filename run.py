"""A training run and its folder: how it resumes, its lock, its checkpoints, and when it stops."""

import json
import os
import signal
import time
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path

import torch
import yaml

try:
    import fcntl
except ImportError:
    raise SystemExit("training needs Linux or macOS; on Windows use WSL") from None

import checkpoint
from support import processes
from support.logger import WANDB, Logger
from support.optimizers import load_optimizer
from support.options import Option, convert, count, flag, path, public
from support.script import UserError, writing

RUN = [
    Option("batch_size", 128, count, "images per step, over all processes"),
    Option("grad_accum", 1, count, "parts into which a batch is split, if it does not fit into memory at once"),
    Option("step_number", 100_000, count, "training steps in total"),
    Option("save_every", 5000, count, "steps between checkpoints"),
    Option("keep_last", 3, count, "number of newest step checkpoints to keep; the final one is always kept"),
    Option("resume_from_checkpoint", None, path, "a file; latest: output_dir's newest; auto: that, or else a new run"),
    Option("overwrite", False, flag, "start anew in a folder that holds a run; deletes its checkpoints of this kind"),
]
# A resumed run does not take these from its checkpoint: they belong to the machine, to one call of the script, or to
# whoever calls it. A checkpoint may come from a stranger, who must not switch W&B on.
NOT_RESUMED = {"resume_from_checkpoint", "overwrite", "device", "compile"} | {o.name for o in WANDB}


class Run:
    """One training run, with a folder of its own; `main` of train_teacher.py shows how it is used, in order.

    args, tables: the script's options, from `parse_args`. In `run.args` those not given have the values of the run that
    is resumed. kind: teacher or dmd2, the prefix of its checkpoints' names. `step`: finished steps. Only rank 0 writes.
    """

    def __init__(self, args, tables, kind):
        processes.join()
        self.kind, self.step, self.resumed = kind, 0, None
        names = f"{kind}_checkpoint_step_*.pt", f"{kind}_final.pt"
        if args.resume_from_checkpoint == "auto" and not any(chain(*map(Path(args.output_dir).glob, names))):
            print(f"--resume_from_checkpoint auto: a new run in {args.output_dir}")
            args.resume_from_checkpoint = None
        if args.resume_from_checkpoint:
            if args.overwrite:
                raise UserError("--overwrite starts a run, --resume_from_checkpoint continues one: give one of them")
            self.resumed_from, self.resumed = find_checkpoint(args.resume_from_checkpoint, args.output_dir, kind)
            if checkpoint.kind(self.resumed) != kind or "random_state" not in self.resumed:
                raise UserError(f"checkpoint {self.resumed_from}: not of a training by train_{kind}.py")
            self.step = self.resumed["step"]
            self.take_options(args, tables)
        if args.batch_size % (args.grad_accum * (size := processes.world_size())):
            by = f"--grad_accum {args.grad_accum}" + f" times torchrun's {size} processes" * (size > 1)
            raise UserError(f"--batch_size {args.batch_size} must be divisible by {by}")
        self.args, self.folder = args, Path(args.output_dir)
        self.continues = bool(self.resumed) and Path(self.resumed_from).parent.resolve() == self.folder.resolve()
        # A branch is a new run at W&B, which drops what is sent for steps that it already has.
        self.wandb_run_id = self.resumed.get("wandb_run_id") if self.continues else None
        self.holds = sorted([*self.folder.glob("*_checkpoint_step_*.pt"), *self.folder.glob("*_final.pt")])
        if self.holds and not self.continues and not self.args.overwrite:
            mend = "give --resume_from_checkpoint latest, --overwrite or another folder"
            raise UserError(f"--output_dir {self.folder} holds another run ({self.holds[-1].name}): {mend}")

    def take_options(self, args, tables):
        """Gives `args` the options of the run that is resumed, but for those that were given and `NOT_RESUMED`."""
        stored = self.resumed["config"] | {"output_dir": str(Path(self.resumed_from).parent)}
        data_dir = args.data_dir
        for option in chain(*tables.values()):
            if option.name in stored and option.name not in args.given and option.name not in NOT_RESUMED:
                source = f"checkpoint {self.resumed_from}: {option.name}"
                setattr(args, option.name, convert(option, stored[option.name], source))
        if args.data_dir != data_dir and args.dataset != "mnist5k" and not os.path.exists(args.data_dir):
            where = f"trained on data in {args.data_dir}, which is not here: give --data_dir"
            raise UserError(f"checkpoint {self.resumed_from}: {where}")  # else a file could choose where data are put

    @contextmanager
    def start(self, device, batches, facts, **parts):
        """A context that holds the folder and the signals, and is the logger. If the run resumes, restores its state.

        At its end, unless there was an error, it saves the final checkpoint, or, after a stop, one to resume from.
        facts: further entries of its checkpoints: the network's `model_config`, `class_names`, ...
        parts: networks and optimizers; a checkpoint holds each under its name here followed by `_state_dict`. None for
        one that this run does not use. Raises UserError for another run's folder or another network's checkpoint.
        """
        self.batches, self.parts = batches, parts
        self.random = {"cpu": torch.random}
        if device.type != "cpu":
            self.random[device.type] = torch.get_device_module(device)
        self.facts = {**facts, "config": public(self.args), "versions": checkpoint.versions()}
        if self.resumed:
            self.restore()
        if processes.rank():  # the processes have the same weights, but draw different noise
            torch.manual_seed(self.args.seed + 1000003 * self.step + processes.rank())
        if processes.all_max(self.step) != self.step:  # also waits here until all have loaded the checkpoint
            raise UserError("the processes resume from different checkpoints: all machines need one --output_dir")
        final, done = f"{self.kind}_final.pt", self.step >= self.args.step_number
        finished = done and self.continues and Path(self.resumed_from).name == final  # it then stays as it is
        self.writes = processes.is_main() and not finished
        with ExitStack() as at_exit:  # after it, in a notebook, the next call may use the folder and the signals
            try:
                if self.writes:
                    self.take_folder(at_exit)
            except UserError:
                processes.all_max(1)  # answers the others, who wait below, so that all end
                raise
            if processes.all_max(0):  # 1 if the first process failed above
                raise UserError(f"--output_dir {self.folder}: refused, as the first process tells")
            self.logger = Logger(self.args, self.step, self.wandb_run_id)
            if self.resumed:
                told = "nothing left to train; give a larger --step_number to continue" if done else "going on"
                self.logger.message(f"{told} from {self.resumed_from} at step {self.step}")
            if (warmup := self.args.lr_warmup_steps) > self.args.step_number:
                more = f"--lr_warmup_steps {warmup} is more than the run's {self.args.step_number} steps"
                self.logger.message(f"{more}: the learning rate never reaches its full value")
            self.resumed = None  # it is large, mainly its moments
            self.stop = Stop(at_exit)
            at_exit.push(lambda error, *_: self.logger.close(exit_code=int(error is not None)))
            yield self.logger
            name = final if self.step >= self.args.step_number else f"{self.kind}_checkpoint_step_{self.step}.pt"
            self.save(name)
            if self.stop.exit_status:
                self.logger.message(f"stopped; resume with --resume_from_checkpoint {self.folder / name}")
        processes.leave()

    def restore(self):
        state, source = self.resumed, f"checkpoint {self.resumed_from}"
        for fact, ours in self.facts.items():  # network, classes, the generator's noise levels
            if fact not in ("config", "versions") and ours != state.get(fact):
                raise UserError(f"{source}: its {fact} differs from this run's, {ours}")
        key = ""
        try:
            for name, part in self.parts.items():
                key = f"{name}_state_dict"
                if isinstance(part, torch.optim.Optimizer):
                    load_optimizer(part, state[key])
                elif part is not None:
                    new_average = name.startswith("ema") and key not in state  # it starts from the weights
                    part.load_state_dict(checkpoint.weights(state) if new_average else state[key])
            key = "random_state"
            for name in self.random.keys() & {"cpu", *state[key]}:  # it may come from another device
                self.random[name].set_rng_state(state[key][name])
            self.batches.images_seen = state["images_seen"]
        except torch.OutOfMemoryError:
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            raise UserError(f"{source}: its {key} does not fit; resume it with the options of its run") from None

    def take_folder(self, at_exit):
        """Locks the folder, cleans up after a kill, and renames checkpoints of later steps.

        The lock holds until the ExitStack `at_exit` or the process ends. Raises UserError if another run has it.
        """
        config, metrics = self.folder / "config.yaml", self.folder / "metrics.jsonl"
        with writing(f"--output_dir {self.folder}"):
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
            (self.folder / ".lock").touch()
            lock = at_exit.enter_context((self.folder / ".lock").open())  # to read: writing keeps a disk busy
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"--output_dir {self.folder}: another process trains there; choose another") from None
            except OSError as error:  # some network file systems
                print(f"--output_dir {self.folder}: cannot be locked ({error.strerror}); no other run may use it")

            for file in self.folder.glob(f"{self.kind}_*.pt.tmp"):  # of a kill
                file.unlink()
            for step, file in checkpoint.all_checkpoints(self.folder, self.kind):
                if self.args.overwrite:
                    file.unlink()
                elif not self.continues:
                    raise UserError(f"--output_dir {self.folder}: another run has begun there; choose another")
                elif step > self.step:  # of another continuation, which `latest` must not find
                    set_aside(file)
                    self.wandb_run_id = None  # so this is a branch
            if config.exists() and not self.holds:  # the user's own
                set_aside(config)
            rows = [json.dumps(row) + "\n" for row in read_metrics(metrics) if row["step"] <= self.step]
            checkpoint.write(metrics, lambda file: file.write("".join(rows).encode()))
            # config.yaml is to repeat the run from its start
            afresh = public(self.args) | {"resume_from_checkpoint": None, "overwrite": False}
            config.write_text(yaml.safe_dump(afresh, sort_keys=False, allow_unicode=True), encoding="utf-8")

    def goes_on(self):
        """Whether to train another step. Raises UserError after `--max_bad_steps` skipped ones in a row."""
        done = self.step >= self.args.step_number
        if self.step % self.args.log_every == 0 or done:  # not at every step: it waits for the device
            worst = max(int(getattr(part, "bad_steps", (0, 0))[1]) for part in self.parts.values())
            if worst >= self.args.max_bad_steps:
                mend = "lower the learning rate, and resume from the last checkpoint"
                raise UserError(f"step {self.step}: {worst} steps in a row had gradients that are not finite: {mend}")
        return not done and not self.stop.is_due()

    def save_if_due(self):
        if self.step % self.args.save_every == 0:
            self.save(f"{self.kind}_checkpoint_step_{self.step}.pt")

    def save(self, name):
        """Writes a checkpoint, and deletes all but the newest `--keep_last`."""
        if not self.writes:
            return
        file = self.folder / name
        state = {f"{key}_state_dict": part.state_dict() for key, part in self.parts.items() if part is not None}
        random_state = {name: module.get_rng_state() for name, module in self.random.items()}
        state |= {"step": self.step, "images_seen": self.batches.images_seen, "random_state": random_state}
        checkpoint.save(file, state | self.facts | {"wandb_run_id": self.logger.wandb_run_id})
        self.logger.message(f"saved {file}")
        self.logger.artifact(file)
        for _, old in checkpoint.step_checkpoints(self.folder, self.kind)[: -self.args.keep_last]:
            old.unlink(missing_ok=True)


def find_checkpoint(name, folder, kind):
    """(file, state) of the checkpoint `name`: latest or auto is the newest whole one of `kind` in `folder`."""
    if name not in ("latest", "auto"):
        return name, checkpoint.load(name)
    for _, file in reversed(checkpoint.all_checkpoints(folder, kind)):
        try:
            return file, checkpoint.load(file)
        except UserError as error:
            print(f"{error}; resuming from the one before")
    raise UserError(f"--resume_from_checkpoint {name}: no checkpoints in {folder}")


def read_metrics(file):
    """The lines of a run's `metrics.jsonl` as dicts; those that a kill or a power cut has damaged are left out."""
    rows = []
    for line in file.read_text(errors="replace").splitlines() if file.exists() else []:
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def set_aside(file):
    """Renames `file`, so that its name ends in .old, or in .old2, .old3, ... where there is one."""
    names = (file.with_name(f"{file.name}.old{number}") for number in ["", *range(2, 1000)])
    file.rename(next(name for name in names if not name.exists()))


class Stop:
    """Ends a loop after the current step on SIGINT, SIGTERM, SIGUSR1 (a scheduler's warning) or SIGHUP (no terminal).

    A second one ends the process at once, except for SIGHUP, and except within a second of the first: torchrun and a
    scheduler may both forward the same signal. If SIGHUP is ignored, as under nohup, it stays ignored. Under torchrun
    `is_due` asks all processes, so that they stop after the same step. at_exit: an ExitStack, which gives the signals
    back to whoever handled them before, such as a notebook.
    """

    def __init__(self, at_exit):
        self.signal = self.exit_status = 0
        with suppress(ValueError):  # in a thread, which may not handle signals
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    previous = signal.signal(number, self.receive)
                    at_exit.callback(signal.signal, number, previous)

    def receive(self, number, frame):
        if not self.signal:
            self.signal, self.since = number, time.monotonic()
        elif number != signal.SIGHUP and time.monotonic() > self.since + 1:  # a closed terminal does not skip the save
            os._exit(128 + number)

    def is_due(self):
        self.exit_status = processes.all_max(128 + self.signal if self.signal else 0)
        return self.exit_status > 0
