"""What a run reports: a progress bar, `metrics.jsonl`, sample grids, and Weights & Biases if it is enabled."""

import json
import math
import os
import time
from pathlib import Path

import torch
from tqdm import tqdm

from support import processes
from support.images import save_grid
from support.options import Option, choice, count, flag, path, public, text
from support.script import writing

LOGGING = [
    Option("log_every", 50, count, "steps between lines of metrics.jsonl"),
    Option("sample_every", 1000, count, "steps between sample grids in output_dir/samples"),
]
WANDB = [
    Option("wandb", False, flag, "log to Weights & Biases"),
    Option("wandb_project", None, text, "project; default: WANDB_PROJECT, or minimal-dmd"),
    Option("wandb_run_name", None, text, "name of the run"),
    Option("wandb_mode", None, choice("online", "offline", "disabled"), "default: WANDB_MODE, or online"),
    Option("wandb_dir", None, path, "of W&B's files, with copies of checkpoints; default: WANDB_DIR, or ./log/wandb"),
    Option("wandb_key", None, text, "API key; never stored (alternatives: `wandb login`, WANDB_API_KEY)"),
    Option("wandb_log_every", 50, count, "steps between scalars: the lesser of this and log_every"),
    Option("wandb_log_images", False, flag, "send noised and denoised images from the losses"),
    Option("wandb_log_samples", False, flag, "send sample grids"),
    Option("wandb_sample_every", 1000, count, "steps between images: the lesser of this and sample_every"),
    Option("wandb_log_checkpoints", False, flag, "send checkpoints as artifacts"),
]


class Logger:
    """Metrics of one run. `log` synchronises with the device only every `log_every` steps, when it writes means.

    Under torchrun only rank 0 writes and prints; the others send it their metrics. args: the script's options;
    start_step: the step that a resumed run starts from; wandb_run_id: its run at W&B.
    """

    message = staticmethod(tqdm.write)  # a line above the bar

    def __init__(self, args, start_step=0, wandb_run_id=None):
        self.args, self.output_dir = args, Path(args.output_dir)
        silent = None if processes.is_main() else True  # None: tqdm is silent without a terminal
        self.bar = tqdm(total=args.step_number, initial=start_step, unit="step", disable=silent, dynamic_ncols=True)
        self.sums, self.losses = {}, {}
        self.log_every = min(args.log_every, args.wandb_log_every) if args.wandb else args.log_every
        sends = args.wandb and (args.wandb_log_samples or args.wandb_log_images)
        self.sample_every = min(args.sample_every, args.wandb_sample_every) if sends else args.sample_every
        self.last_step, self.last_time = start_step, time.perf_counter()
        self.wandb_run_id, self.wandb_is_on, self.own_variables = wandb_run_id, args.wandb and processes.is_main(), {}
        self.send(self.start_wandb)

    def start_wandb(self):
        """Starts the W&B run, that of `wandb_run_id` if there is one."""
        import wandb  # only if enabled: it takes a second, and need not be installed

        args = self.args
        folder = os.path.abspath(args.wandb_dir or os.environ.get("WANDB_DIR") or "./log/wandb")
        os.makedirs(folder, exist_ok=True)
        # By default W&B copies what it sends to the home folder.
        folders = {"WANDB_DATA_DIR": folder, "WANDB_CACHE_DIR": f"{folder}/cache"}
        self.own_variables = {name: path for name, path in folders.items() if name not in os.environ}
        os.environ.update(self.own_variables)
        self.wandb_run = wandb.init(
            project=args.wandb_project or os.environ.get("WANDB_PROJECT") or "minimal-dmd",
            name=args.wandb_run_name,
            mode=args.wandb_mode,
            dir=folder,
            config=public(args),
            id=self.wandb_run_id,
            resume="allow",
            # W&B records the command line in a run's metadata, but must not if that contains the key.
            settings=wandb.Settings(api_key=args.wandb_key, x_disable_meta=args.wandb_key is not None),
        )
        self.wandb_run_id = self.wandb_run.id
        self.wandb_image = wandb.Image

    def send(self, act):
        """Calls `act()` if W&B is on. A failure, whatever W&B raises, turns it off but never stops the training."""
        if self.wandb_is_on:
            try:
                act()
            except Exception as error:
                self.wandb_is_on = False
                reason = " ".join(str(error).split()) or type(error).__name__
                self.message(f"Weights & Biases is now off, training continues: {reason}")

    def add(self, metrics):
        """Adds `metrics` (scalar tensors or numbers), of a step or of one part of its batch, to the means."""
        for name, value in metrics.items():
            total, number = self.sums.get(name, (0.0, 0))
            self.sums[name] = total + (value.detach() if torch.is_tensor(value) else value), number + 1

    def log(self, step, metrics):
        """Adds `metrics` too, and ends the step: every `log_every` steps the means are written."""
        self.add(metrics)
        self.bar.update()
        if step % self.log_every and step != self.args.step_number:
            return

        means = torch.tensor([float(total) / number for total, number in self.sums.values()], dtype=torch.float64)
        processes.all_mean([means])
        means = dict(zip(self.sums, means.tolist(), strict=True))
        now = time.perf_counter()
        images_per_second = (step - self.last_step) * self.args.batch_size / (now - self.last_time)
        self.sums, self.last_step, self.last_time = {}, step, now
        if not processes.is_main():
            return
        row = {"step": step, **means, "images_per_second": float(f"{images_per_second:.6g}")}
        row = {name: value if math.isfinite(value) else None for name, value in row.items()}  # JSON has no NaN
        file = self.output_dir / "metrics.jsonl"
        with writing(file), file.open("a") as stream:
            print(json.dumps(row), file=stream)

        # Losses not new since the last line (the generator's) are shown again, so that columns keep their places.
        self.losses |= {name: f"{value:.4g}" for name, value in means.items() if "loss" in name}
        told = [f"{name} {value}" for name, value in sorted(self.losses.items())] + [f"{images_per_second:.0f} img/s"]
        self.bar.set_postfix_str("  ".join(told))
        if self.bar.disable:  # no terminal: plain lines for a log file
            left = (self.args.step_number - step) * self.args.batch_size / images_per_second
            print(f"step {step}/{self.args.step_number}", *told, f"{left:.0f} s left", sep="  ", flush=True)
        self.send(lambda: self.wandb_run.log(row, step=step))

    def wants_samples(self, step):
        return (step % self.sample_every == 0 or step == self.args.step_number) and processes.is_main()

    def grid(self, step, what, *blocks):
        """Writes blocks of `what`, samples or images, to `samples/`, side by side, and sends them to W&B if enabled."""
        file = self.output_dir / "samples" / (f"step_{step:07d}.png" if what == "samples" else "images.png")
        save_grid(file, *[block[:80] for block in blocks], columns=8)
        if getattr(self.args, f"wandb_log_{what}"):
            self.send(lambda: self.wandb_run.log({what: self.wandb_image(str(file))}, step=step))

    def artifact(self, file):
        """Sends the checkpoint `file` to W&B if that is enabled."""
        if self.args.wandb_log_checkpoints:
            options = dict(name=f"{self.wandb_run_id}-checkpoint", type="model", aliases=[file.stem])
            self.send(lambda: self.wandb_run.log_artifact(str(file), **options))

    def close(self, exit_code=0):
        self.bar.close()
        self.send(lambda: self.wandb_run.finish(exit_code=exit_code))
        for name in self.own_variables:  # in a notebook the next run may have another folder
            os.environ.pop(name, None)
