"""What a run reports: a progress bar, `metrics.jsonl`, sample grids, and Weights & Biases if it is enabled."""

import json
import math
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from support import parallel
from support.config import public, writing
from support.images import save_grid

REPORT_AFTER, REPORT_SECONDS = 10, 30  # iterations before the first line of `progress`, and seconds between the next


@contextmanager
def wandb_folders(folder):
    """A context in which W&B copies the files that it sends to `folder`, not the home folder, unless the environment names one."""
    names = {"WANDB_DATA_DIR": "", "WANDB_CACHE_DIR": "cache"}
    ours = {name: str(Path(folder, part).resolve()) for name, part in names.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


class Logger:
    """Metrics of one run. `log` synchronises with the device only every `log_every` steps, when it writes means.

    Under torchrun only rank 0 writes and prints; the others send it their metrics.

    args: the script's options; start_step: the step that a resumed run starts from; wandb_run_id: its run at W&B.
    """

    def __init__(self, args, start_step=0, wandb_run_id=None):
        self.args, self.writes = args, parallel.rank() == 0
        self.output_dir = Path(args.output_dir)
        self.metrics_path = self.output_dir / "metrics.jsonl"
        silent = None if self.writes else True  # None: tqdm is silent without a terminal
        self.bar = tqdm(total=args.step_number, initial=start_step, unit="step", disable=silent, dynamic_ncols=True)
        self.sums, self.counts, self.losses = {}, {}, {}
        self.log_every = min(args.log_every, args.wandb_log_every) if args.wandb else args.log_every
        self.last_step, self.last_time = start_step, time.perf_counter()
        self.last_wandb_step, self.for_wandb = start_step, {}  # the latest of each metric since the last were sent
        self.wandb_run_id = wandb_run_id
        self.wandb_run = self.start_wandb() if args.wandb and self.writes else None
        if self.wandb_run:
            self.wandb_run_id = self.wandb_run.id

    def start_wandb(self):
        """The W&B run, that of `wandb_run_id` if there is one. If W&B fails, prints that and returns None: training goes on."""
        args = self.args
        try:
            import wandb  # only if enabled: it takes a second, and need not be installed

            Path(args.wandb_dir).mkdir(parents=True, exist_ok=True)
            with wandb_folders(args.wandb_dir):
                return wandb.init(
                    project=args.wandb_project,
                    name=args.wandb_run_name,
                    mode=args.wandb_mode,
                    dir=args.wandb_dir,
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
        self.message(f"Weights & Biases is now off, training continues: {' '.join(str(error).split()) or type(error).__name__}")

    def send(self, act):
        """Calls `act(run)` if W&B is on. A failure turns W&B off but never stops the training."""
        if self.wandb_run:
            try:
                act(self.wandb_run)
            except Exception as error:  # as in start_wandb
                self.without_wandb(error)

    def log(self, step, metrics):
        """Adds the step's `metrics` (0-dimensional tensors or numbers) to the running means, written every `log_every` steps."""
        for name, value in metrics.items():
            value = value.detach() if torch.is_tensor(value) else value
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.bar.update()
        if step % self.log_every and step != self.args.step_number:
            return

        values = torch.tensor([float(total) / self.counts[name] for name, total in self.sums.items()], dtype=torch.float64)
        parallel.average([values])
        means = dict(zip(self.sums, values.tolist(), strict=True))
        now = time.perf_counter()
        images_per_second = (step - self.last_step) * self.args.batch_size / (now - self.last_time)
        self.sums, self.counts, self.last_step, self.last_time = {}, {}, step, now
        if not self.writes:
            return
        row = {"step": step, **means, "images_per_second": round(images_per_second, 1)}
        with writing(self.metrics_path), open(self.metrics_path, "a") as file:
            print(json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()}), file=file)  # JSON has no NaN

        # Losses that are not new since the last line (the generator's) are shown again, so that columns keep their places.
        self.losses |= {name: f"{value:.4g}" for name, value in means.items() if "loss" in name}
        losses = dict(sorted(self.losses.items()))
        self.bar.set_postfix({**losses, "img/s": f"{images_per_second:.0f}"})
        if self.bar.disable:  # no terminal: plain lines for a log file
            left = (self.args.step_number - step) * self.args.batch_size / images_per_second
            parts = [f"{name} {value}" for name, value in losses.items()]
            print(
                f"step {step}/{self.args.step_number}",
                *parts,
                f"{images_per_second:.0f} img/s",
                f"{left:.0f} s left",
                sep="  ",
                flush=True,
            )
        self.for_wandb |= row
        if self.wandb_run and step - self.last_wandb_step >= self.args.wandb_log_every:
            self.send(lambda run: run.log(self.for_wandb, step=step))
            self.last_wandb_step, self.for_wandb = step, {}

    def wants_samples(self, step):
        due = step % self.args.sample_every == 0 or step == self.args.step_number or self.wandb_wants("samples", step)
        return due and self.writes

    def wandb_wants(self, what, step):
        """Whether W&B is to get `what`, samples or images, at this step."""
        due = step % self.args.wandb_sample_every == 0 or step == self.args.step_number
        return bool(self.wandb_run) and getattr(self.args, f"wandb_log_{what}") and due

    def samples(self, step, *blocks, columns):
        """Writes a sample grid to `samples/`, and sends it to W&B when due."""
        path = self.output_dir / "samples" / f"step_{step:07d}.png"
        save_grid(path, *blocks, columns=columns)
        if self.wandb_wants("samples", step):
            self.send_image(step, "samples", path)

    def images(self, step, *blocks):
        """Sends the first images of each block to W&B, side by side."""
        path = self.output_dir / "samples" / "images.png"
        save_grid(path, *[block[:32] for block in blocks], columns=4)
        self.send_image(step, "images", path)

    def send_image(self, step, name, path):
        import wandb

        self.send(lambda run: run.log({name: wandb.Image(str(path))}, step=step))

    def artifact(self, path):
        """Sends the checkpoint at `path` to W&B if that is enabled."""
        if self.args.wandb_log_checkpoints:
            options = dict(type="model", aliases=[path.stem])
            with wandb_folders(self.args.wandb_dir):
                self.send(lambda run: run.log_artifact(str(path), name=f"{run.id}-checkpoint", **options))

    def message(self, text):
        tqdm.write(text, file=sys.stdout)

    def close(self):
        self.bar.close()
        self.send(lambda run: run.finish())


def progress(numbers, what, unit):
    """Yields the `numbers`, a range, and reports the time left: early on and then regularly, on a terminal with a bar.

    what: a description of the work; unit: what `numbers` count.
    """
    start = reported = time.monotonic()
    silent = None if parallel.rank() == 0 else True  # None: tqdm is silent without a terminal
    with tqdm(total=numbers.stop, initial=numbers.start, unit=unit, disable=silent) as bar:
        for turn, number in enumerate(numbers, 1):
            yield number
            done = min(number + numbers.step, numbers.stop)
            bar.update(done - number)
            now = time.monotonic()
            if turn == REPORT_AFTER or (bar.disable and now > reported + REPORT_SECONDS):
                left = (now - start) / turn * (len(numbers) - turn) / 60
                bar.write(f"{what}: {unit} {done} of {numbers.stop}, about {left:.1f} minutes left", file=sys.stdout)
                sys.stdout.flush()
                reported = now
