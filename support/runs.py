"""A training run and its folder: how it resumes, its lock, its checkpoints, and when it stops."""

import fcntl
import json
import os
import signal
import sys
import time
from itertools import chain, count
from pathlib import Path

import torch
import yaml

import checkpoint
from support import parallel
from support.config import UserError, make_folder, options_of_run, public, writing
from support.logger import Logger
from support.training import load_optimizer

KINDS = {"teacher": "a teacher with this network", "dmd2": "a generator with the teacher's network"}
OPTIONAL_PARTS = {"guidance_cls_state_dict": "gan_classifier", "optimizer_gan_state_dict": "gan_lr"}  # and the option of each


class Run:
    """One training run, with a folder of its own. A script uses it from top to bottom:

        run = Run(args, "teacher")     # loads the checkpoint to resume from, if any, as `run.resumed`
        run.start(...)                 # locks the folder, restores the checkpoint, opens `run.logger`
        while run.goes_on():
            ...
            run.step += 1              # finished steps
            run.save_if_due()
        return run.finish()            # saves the last checkpoint; returns the script's exit status

    args: the script's options. In `run.args` those that were not given have the values of the run that is resumed.
    kind: teacher or dmd2, the prefix of its checkpoints' names. Under torchrun only rank 0 writes.
    """

    def __init__(self, args, kind):
        self.kind, self.step, self.resumed = kind, 0, None
        if args.resume_from_checkpoint:
            self.resumed_from, self.resumed = resume(args.resume_from_checkpoint, args.output_dir, kind)
            if checkpoint.kind(self.resumed) != kind:
                raise UserError(f"checkpoint {self.resumed_from}: not {KINDS[kind]}")
            if "random_state" not in self.resumed:
                raise UserError(f"checkpoint {self.resumed_from}: only weights, to sample or distil; training cannot resume here")
            self.step = self.resumed["step"]
            stored = self.resumed["model_config"] | self.resumed["config"]
            args = options_of_run(args, kind, stored | {"output_dir": str(Path(self.resumed_from).parent)}, self.resumed_from)
        self.args, self.folder = args, Path(args.output_dir)

    def start(self, device, batches, parts, **facts):
        """Locks the folder. If the run resumes from a checkpoint, restores step, data position, random numbers and `parts`.

        parts: networks and optimizers by their keys in a checkpoint; None for one that this run does not use.
        facts: further entries of its checkpoints: the network's `model_config`, `class_names`, ...
        Raises UserError if the folder holds another run or the checkpoint another network.
        """
        self.device, self.batches, self.parts = device, batches, parts
        self.facts = {**facts, "config": public(self.args), "versions": checkpoint.versions()}
        if self.resumed:
            self.restore()
        if parallel.agree(self.step) != self.step:  # also waits here until all have loaded the checkpoint
            raise UserError("the processes resume from different checkpoints; --output_dir must be one folder for all machines")
        continues = parallel.rank() or self.take_folder()
        # W&B drops what is sent for steps that it already has, so a run that branches off gets a W&B run of its own.
        self.logger = Logger(self.args, self.step, self.resumed.get("wandb_run_id") if self.resumed and continues else None)
        if self.resumed and not self.done:
            self.logger.message(f"going on from {self.resumed_from} at step {self.step}")
        if (warmup := self.args.lr_warmup_steps) > self.args.step_number:
            self.logger.message(
                f"--lr_warmup_steps {warmup} is more than the run's {self.args.step_number} steps: "
                f"the learning rate reaches no more than {self.args.step_number / warmup:.0%} of its value"
            )
        kind = self.device.type
        if self.resumed and kind != "cpu" and self.resumed["random_state"].get(kind) is None:
            self.logger.message(f"{self.resumed_from} was not written on {kind}: the GPU's random numbers start from the seed")
        if self.done:
            self.logger.message(
                f"nothing left to train: {self.resumed_from} is at step {self.step}; to continue, give a larger --step_number"
            )
        self.resumed = None  # it is large, mainly its moments
        self.stop = Stop(self.args.max_minutes)

    def restore(self):
        state = self.resumed
        if state["model_config"] != self.facts["model_config"]:
            raise UserError(f"checkpoint {self.resumed_from}: not {KINDS[self.kind]} ({self.facts['model_config']})")
        if (sigmas := self.facts.get("student_sigmas")) != state.get("student_sigmas"):
            raise UserError(f"checkpoint {self.resumed_from}: a student at sigma {state['student_sigmas']}, not at {sigmas}")
        for key, option in OPTIONAL_PARTS.items():
            if (key in state) != (key in self.parts):
                how = "with" if key in state else "without"
                raise UserError(f"checkpoint {self.resumed_from}: trained {how} --{option}; resume it {how} that option")
        for name, part in self.parts.items():
            try:
                if isinstance(part, torch.optim.Optimizer):
                    load_optimizer(part, state[name])
                elif part is not None:  # a new average starts from the weights
                    part.load_state_dict(state[name] or state["feedforward_model_state_dict"])
            except (KeyError, RuntimeError, ValueError):
                raise UserError(
                    f"checkpoint {self.resumed_from}: its {name} does not fit; resume it with the options of its run"
                ) from None
        self.batches.images_seen = state["images_seen"]
        torch.set_rng_state(state["random_state"]["cpu"].cpu())
        if (own := state["random_state"].get(self.device.type)) is not None and self.device.type != "cpu":
            torch.get_device_module(self.device).set_rng_state(own.cpu())  # of the current device, which `choose_device` set

    def take_folder(self):
        """Locks the folder: refuses another run's, cleans up after a kill, and renames checkpoints of steps after `step`.

        Returns whether this continues the resumed run and does not branch off: in its folder, which holds no later checkpoints.
        """
        args = self.args
        make_folder("--output_dir", self.folder / "samples")
        with writing(self.folder):
            (self.folder / ".lock").touch()
            self.lock = (self.folder / ".lock").open()  # open, and so locked, until `finish` or the end of the process
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"--output_dir {self.folder}: another process trains there; choose another folder") from None
            present = checkpoint.by_step(self.folder, self.kind)
            holds = present or checkpoint.by_step(self.folder, "dmd2" if self.kind == "teacher" else "teacher")
            if holds and not args.resume_from_checkpoint and not args.overwrite:
                raise UserError(
                    f"--output_dir {self.folder} holds another run ({holds[-1][1].name}); "
                    "resume it with --resume_from_checkpoint latest, or start a new one with --overwrite"
                )
            continues = bool(self.resumed) and Path(self.resumed_from).parent.resolve() == self.folder.resolve()
            if holds and self.resumed and not continues:
                raise UserError(
                    f"--output_dir {self.folder} holds another run ({holds[-1][1].name}), not that of {self.resumed_from}; "
                    f"give --output_dir {Path(self.resumed_from).parent}, or a new folder"
                )
            for file in self.folder.glob(f"{self.kind}_*.pt.tmp"):
                file.unlink()
            for step, file in present:
                if args.overwrite:
                    file.unlink()
                elif step > self.step:  # from another continuation, which `latest` must not find
                    set_aside(file)
                    continues = False
            self.cut_metrics()
            # config.yaml is to repeat the run from its start
            afresh = public(args) | {"resume_from_checkpoint": None, "overwrite": False}
            content = yaml.safe_dump(afresh, sort_keys=False, allow_unicode=True)
            path = self.folder / "config.yaml"
            if path.exists() and not holds and path.read_text(encoding="utf-8", errors="replace") != content:
                set_aside(path)  # the user's own
            path.write_text(content, encoding="utf-8")
        return continues

    def cut_metrics(self):
        """Drops the lines of `metrics.jsonl` after `step`, and an incomplete one."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if self.step and path.exists() else []
        temporary = path.with_name("metrics.jsonl.tmp")
        temporary.write_text("".join(line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= self.step))
        temporary.replace(path)

    @property
    def done(self):
        return self.step >= self.args.step_number

    def goes_on(self):
        """Whether there is a step left to train and no request to stop."""
        return not self.done and not self.stop.due

    def save_if_due(self):
        if self.step % self.args.save_every == 0:
            self.save(f"{self.kind}_checkpoint_step_{self.step}.pt")

    def save(self, name):
        """Writes a checkpoint, and deletes old ones according to `--keep_last` and `--keep_every`."""
        if parallel.rank():
            return
        path = self.folder / name
        state = {key: None if part is None else part.state_dict() for key, part in self.parts.items()}
        random_state = {"cpu": torch.get_rng_state()}
        if self.device.type != "cpu":
            random_state[self.device.type] = torch.get_device_module(self.device).get_rng_state()
        state |= {"step": self.step, "images_seen": self.batches.images_seen, "random_state": random_state}
        checkpoint.save(path, state | self.facts | {"wandb_run_id": self.logger.wandb_run_id})
        self.logger.message(f"saved {path}")
        self.logger.artifact(path)
        files = checkpoint.numbered(self.folder, self.kind)
        for step in list(files)[: -self.args.keep_last]:
            if not self.args.keep_every or step % self.args.keep_every:
                files[step].unlink()

    def finish(self):
        """Saves the final checkpoint, or, if the run was stopped, one to resume from. Returns the script's exit status."""
        name = f"{self.kind}_final.pt" if self.done else f"{self.kind}_checkpoint_step_{self.step}.pt"
        self.save(name)
        if not self.done:
            self.logger.message(f"stopped after step {self.step}; resume with --resume_from_checkpoint {self.folder / name}")
        self.logger.close()
        parallel.barrier()  # after the first process that ends with a signal's status, torchrun ends the others at once
        self.stop.end()
        if not parallel.rank():
            self.lock.close()
        return 0 if self.done else self.stop.exit_status


def resume(path, folder, kind):
    """(file, state) of the checkpoint that `path` names. `latest` is the newest of `kind` in `folder` that is not damaged.

    Raises UserError if there is none.
    """
    if path != "latest":
        return path, checkpoint.load(path)
    for _, file in reversed(checkpoint.by_step(folder, kind)):
        try:
            return file, checkpoint.load(file)
        except UserError as error:
            print(f"{error}; resuming from the one before", file=sys.stderr)
    raise UserError(f"--resume_from_checkpoint latest: no checkpoints in {folder}")


def set_aside(file):
    """Renames `file`, so that its name ends in .old, or in .old2, .old3, ... where there is one."""
    names = (file.with_name(f"{file.name}.old{number}") for number in chain([""], count(2)))
    file.rename(next(name for name in names if not name.exists()))


class Stop:
    """Ends a loop after the current step: on SIGINT, SIGTERM or SIGHUP (a closed terminal), or after `max_minutes`.

    A second SIGINT or SIGTERM ends the process at once, except within a second of the first: torchrun and a scheduler may both
    forward the same signal. If SIGHUP is ignored, as under nohup, it stays ignored (torchrun starts its processes with the
    default, even under nohup). Under torchrun `due` asks all processes, so that they stop after the same step.
    """

    def __init__(self, max_minutes=None):
        self.signal = self.exit_status = 0
        self.deadline = time.monotonic() + 60 * max_minutes if max_minutes else float("inf")
        self.previous = {}  # handlers
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self.previous[number] = signal.signal(number, self.receive)

    def end(self):
        """Gives the signals back to whoever handled them before, such as a notebook."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def receive(self, number, frame):
        if not self.signal:
            self.signal, self.since = number, time.monotonic()
        elif number != signal.SIGHUP and time.monotonic() > self.since + 1:  # closing a terminal is not a request to skip the save
            os._exit(128 + number)

    @property
    def due(self):
        reason = 128 + self.signal if self.signal else int(time.monotonic() > self.deadline)
        reason = parallel.agree(reason)
        self.exit_status = reason if reason > 1 else 0
        return reason > 0
