"""What a run reports: a progress bar, `metrics.jsonl`, sample grids, and Weights & Biases if it is enabled."""

import json
import math
import os
import sys
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
    Option("wandb_project", "minimal-dmd", text, "project"),
    Option("wandb_run_name", None, text, "name of the run"),
    Option("wandb_mode", "online", choice("online", "offline", "disabled"), "mode"),
    Option("wandb_dir", "./log/wandb", path, "folder of W&B's local files, including copies of checkpoints"),
    Option("wandb_key", None, text, "API key; never stored (alternatives: `wandb login`, WANDB_API_KEY)"),
    Option("wandb_log_every", 50, count, "steps between scalars; replaces log_every"),
    Option("wandb_log_images", False, flag, "send noised and denoised images from the losses"),
    Option("wandb_log_samples", False, flag, "send sample grids"),
    Option("wandb_sample_every", 1000, count, "steps between sample grids and images; replaces sample_every"),
    Option("wandb_log_checkpoints", False, flag, "send checkpoints as artifacts"),
]


class Logger:
    """Metrics of one run. `log` synchronises with the device only every `log_every` steps, when it writes means.

    Under torchrun only rank 0 writes and prints; the others send it their metrics.

    args: the script's options; start_step: the step that a resumed run starts from; wandb_run_id: its run at W&B.
    """

    def __init__(self, args, start_step=0, wandb_run_id=None):
        self.args = args
        self.output_dir = Path(args.output_dir)
        self.metrics_path = self.output_dir / "metrics.jsonl"
        silent = None if processes.is_main() else True  # None: tqdm is silent without a terminal
        self.bar = tqdm(total=args.step_number, initial=start_step, unit="step", disable=silent, dynamic_ncols=True)
        self.sums, self.counts, self.losses = {}, {}, {}
        self.log_every = args.wandb_log_every if args.wandb else args.log_every
        self.sample_every = args.wandb_sample_every if args.wandb else args.sample_every
        self.last_step, self.last_time = start_step, time.perf_counter()
        self.wandb_run_id, self.own_variables = wandb_run_id, {}
        self.wandb_run = self.start_wandb() if args.wandb and processes.is_main() else None
        if self.wandb_run:
            self.wandb_run_id = self.wandb_run.id

    def start_wandb(self):
        """The W&B run, that of `wandb_run_id` if there is one. If W&B fails, returns None: training goes on."""
        args = self.args
        variables = {"project": "PROJECT", "run_name": "NAME", "mode": "MODE", "dir": "DIR"}
        chosen = {  # W&B's environment variables beat our defaults
            "name" if name == "run_name" else name: getattr(args, f"wandb_{name}")
            for name, variable in variables.items()
            if f"wandb_{name}" in args.given or f"WANDB_{variable}" not in os.environ
        }
        try:
            import wandb  # only if enabled: it takes a second, and need not be installed

            Path(args.wandb_dir).mkdir(parents=True, exist_ok=True)
            # By default W&B copies what it sends to the home folder.
            folder = os.path.abspath(args.wandb_dir)
            folders = {"WANDB_DATA_DIR": folder, "WANDB_CACHE_DIR": f"{folder}/cache"}
            self.own_variables = {name: path for name, path in folders.items() if name not in os.environ}
            os.environ.update(self.own_variables)
            return wandb.init(
                **chosen,
                config=public(args),
                id=self.wandb_run_id,
                resume="allow",
                # W&B records the command line in a run's metadata, but must not if that contains the key.
                settings=wandb.Settings(api_key=args.wandb_key, x_disable_meta=args.wandb_key is not None),
            )
        except Exception as error:  # hours of training must not depend on W&B, whatever it raises
            self.without_wandb(error)
            return None

    def without_wandb(self, error):
        self.wandb_run = None
        reason = " ".join(str(error).split()) or type(error).__name__
        self.message(f"Weights & Biases is now off, training continues: {reason}")

    def send(self, act):
        """Calls `act(run)` if W&B is on. A failure turns W&B off but never stops the training."""
        if self.wandb_run:
            try:
                act(self.wandb_run)
            except Exception as error:  # as in start_wandb
                self.without_wandb(error)

    def log(self, step, metrics):
        """Adds the step's `metrics` (scalar tensors or numbers) to the means, written every `log_every` steps."""
        for name, value in metrics.items():
            value = value.detach() if torch.is_tensor(value) else value
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.bar.update()
        if step % self.log_every and step != self.args.step_number:
            return

        values = [float(total) / self.counts[name] for name, total in self.sums.items()]
        values = torch.tensor(values, dtype=torch.float64)
        processes.all_mean([values])
        means = dict(zip(self.sums, values.tolist(), strict=True))
        now = time.perf_counter()
        images_per_second = (step - self.last_step) * self.args.batch_size / (now - self.last_time)
        self.sums, self.counts, self.last_step, self.last_time = {}, {}, step, now
        if not processes.is_main():
            return
        row = {"step": step, **means, "images_per_second": float(f"{images_per_second:.6g}")}
        row = {name: value if math.isfinite(value) else None for name, value in row.items()}  # JSON has no NaN
        with writing(self.metrics_path), open(self.metrics_path, "a") as file:
            print(json.dumps(row), file=file)

        # Losses that are not new since the last line (the generator's) are shown again, so that columns keep their
        # places.
        self.losses |= {name: f"{value:.4g}" for name, value in means.items() if "loss" in name}
        losses = dict(sorted(self.losses.items()))
        self.bar.set_postfix({**losses, "img/s": f"{images_per_second:.0f}"})
        if self.bar.disable:  # no terminal: plain lines for a log file
            left = (self.args.step_number - step) * self.args.batch_size / images_per_second
            parts = [f"step {step}/{self.args.step_number}", *(f"{name} {value}" for name, value in losses.items())]
            print(*parts, f"{images_per_second:.0f} img/s", f"{left:.0f} s left", sep="  ", flush=True)
        self.send(lambda run: run.log(row, step=step))

    def wants_samples(self, step):
        return (step % self.sample_every == 0 or step == self.args.step_number) and processes.is_main()

    def samples(self, step, *blocks, columns):
        """Writes a sample grid to `samples/`, and sends it to W&B if that is enabled."""
        file = self.output_dir / "samples" / f"step_{step:07d}.png"
        save_grid(file, *blocks, columns=columns)
        if self.wandb_run and self.args.wandb_log_samples:
            self.send_image(step, "samples", file)

    def images(self, step, *blocks):
        """Sends the first images of each block to W&B, side by side, if that is enabled."""
        if self.wandb_run and self.args.wandb_log_images:
            file = self.output_dir / "samples" / "images.png"
            save_grid(file, *[block[:32] for block in blocks], columns=4)
            self.send_image(step, "images", file)

    def send_image(self, step, name, file):
        import wandb

        self.send(lambda run: run.log({name: wandb.Image(str(file))}, step=step))

    def artifact(self, file):
        """Sends the checkpoint `file` to W&B if that is enabled."""
        if self.args.wandb_log_checkpoints:
            options = dict(type="model", aliases=[file.stem])
            self.send(lambda run: run.log_artifact(str(file), name=f"{run.id}-checkpoint", **options))

    def message(self, text):
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self, exit_code=0):
        self.bar.close()
        self.send(lambda run: run.finish(exit_code=exit_code))
        for name in self.own_variables:  # in a notebook the next run may have another folder
            os.environ.pop(name, None)
