"""What a run tells: a progress bar, `metrics.jsonl`, sample grids, and Weights & Biases where it is wanted."""

import fcntl
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from tqdm import tqdm

import checkpoint
import parallel
from config import UserError, make_folder, writing
from data import to_uint8


def tile(images, columns):
    """uint8 `[N, C, H, W]` as one picture `[rows * (H + 2), columns * (W + 2), C]` on white (torchvision is slow to import)."""
    images = F.pad(images, (1, 1, 1, 1), value=255)
    missing = -len(images) % columns
    images = torch.cat([images, torch.full_like(images[:1], 255).expand(missing, -1, -1, -1)])
    N, C, H, W = images.shape
    return images.reshape(N // columns, columns, C, H, W).permute(0, 3, 1, 4, 2).reshape(N // columns * H, columns * W, C)


def save_grid(path, *blocks, columns):
    """Writes image batches `[N, C, H, W]` in [-1, 1] as one PNG: side by side, grids of `columns` columns, enlarged if tiny."""
    tiles = [tile(to_uint8(block).cpu(), columns) for block in blocks]
    gap = torch.full_like(tiles[0][:, :8], 255)
    picture = torch.cat([part for grid in tiles for part in (gap, grid)][1:], dim=1)
    picture = Image.fromarray(picture.squeeze(2).numpy())
    scale = max(1, 64 // blocks[0].shape[-1])
    with writing(path):
        picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(path)


class Logger:
    """Metrics of one run. `log` costs no synchronisation with the device except every `log_every` steps, when it writes means.

    Under torchrun rank 0 alone writes and prints; the others only give it their metrics.

    args: the script's options; kind: teacher or dmd2; start_step: the step that a resumed run goes on from.
    """

    def __init__(self, args, kind, start_step=0, wandb_run_id=None):
        self.args, self.kind, self.writes = args, kind, parallel.rank() == 0
        self.output_dir = Path(args.output_dir)
        self.metrics_path = self.output_dir / "metrics.jsonl"
        if parallel.agree(start_step) != start_step:  # they meet here, too, so that all have read what they go on from
            raise UserError("the processes go on from different checkpoints; --output_dir must be one folder for all machines")
        if self.writes:
            self.occupy_folder(start_step)
        silent = None if self.writes else True  # None: where there is no terminal
        self.bar = tqdm(total=args.step_number, initial=start_step, unit="step", disable=silent, dynamic_ncols=True)
        self.sums, self.counts = {}, {}
        self.log_every = min(args.log_every, args.wandb_log_every) if args.wandb else args.log_every
        self.last_step, self.last_time = start_step, time.perf_counter()
        self.last_wandb_step, self.for_wandb = start_step, {}  # the latest of each metric since W&B got the last
        self.wandb_run = self.start_wandb(wandb_run_id) if args.wandb and self.writes else None

    def occupy_folder(self, start_step):
        """Makes the folder this run's alone."""
        make_folder("--output_dir", self.output_dir / "samples")
        # config.yaml repeats the run from its start
        afresh = public(self.args) | {"resume_from_checkpoint": None, "overwrite": False}
        with writing(self.output_dir):
            (self.output_dir / ".lock").touch()
            self.lock = (self.output_dir / ".lock").open()  # locked, through the open file, until the process ends
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"--output_dir {self.output_dir}: another process trains there; take another folder") from None
            self.take_over(start_step)
            (self.output_dir / "config.yaml").write_text(yaml.safe_dump(afresh, sort_keys=False))

    def take_over(self, start_step):
        """Refuses a folder with another run's checkpoints; cleans up after a kill; sets aside what is after `start_step`."""
        present = checkpoint.by_step(self.output_dir, self.kind)
        holds = present or checkpoint.by_step(self.output_dir, "dmd2" if self.kind == "teacher" else "teacher")
        if holds and not self.args.resume_from_checkpoint and not self.args.overwrite:
            raise UserError(
                f"--output_dir {self.output_dir} holds another run ({holds[-1][1].name}); "
                "go on with --resume_from_checkpoint latest, or start afresh with --overwrite"
            )
        for file in self.output_dir.glob(f"{self.kind}_*.pt.tmp"):
            file.unlink()
        for step, file in present:
            if self.args.overwrite:
                file.unlink()
            elif step > start_step:  # this run goes another way from here: `latest` must not come back to them
                file.rename(file.with_name(file.name + ".old"))
        lines = self.metrics_path.read_text().splitlines(keepends=True) if start_step and self.metrics_path.exists() else []
        kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= start_step]
        temporary = self.metrics_path.with_name("metrics.jsonl.tmp")
        temporary.write_text("".join(kept))
        temporary.replace(self.metrics_path)

    def start_wandb(self, run_id):
        """The W&B run, continued where `run_id` is given; None, said once, where W&B cannot be had: training goes on without."""
        args = self.args
        try:
            import wandb  # only where it is wanted: it takes a second, and need not be installed

            Path(args.wandb_dir).mkdir(parents=True, exist_ok=True)
            return wandb.init(
                project=args.wandb_project,
                name=args.wandb_run_name,
                mode=args.wandb_mode,
                dir=args.wandb_dir,
                config=public(args),
                id=run_id,
                resume="allow",
                # W&B records the command line in a run's metadata: not when the key stands in it.
                settings=wandb.Settings(api_key=args.wandb_key, x_disable_meta=args.wandb_key is not None),
            )
        except Exception as error:  # whatever W&B's many parts raise, hours of training must not depend on it
            self.without_wandb(error)
            return None

    def without_wandb(self, error):
        self.wandb_run = None
        self.message(f"Weights & Biases is off from here, training goes on: {' '.join(str(error).split()) or type(error).__name__}")

    def send(self, act):
        """Calls `act(run)` where W&B is on; a failure turns W&B off, never the training."""
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
            print(json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()}), file=file)  # JSON knows no NaN

        losses = {name: f"{value:.4g}" for name, value in means.items() if "loss" in name}
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
        """Sends to W&B what the losses see, the first images of each block side by side."""
        path = self.output_dir / "samples" / "images.png"
        save_grid(path, *[block[:32] for block in blocks], columns=4)
        self.send_image(step, "images", path)

    def send_image(self, step, name, path):
        import wandb

        self.send(lambda run: run.log({name: wandb.Image(str(path))}, step=step))

    def saved(self, path):
        """Tells that a checkpoint was written, sends it to W&B where that is wanted, and deletes those not to be kept."""
        self.message(f"saved {path}")
        if self.args.wandb_log_checkpoints:
            artifact = dict(type="model", aliases=[path.stem])
            self.send(lambda run: run.log_artifact(str(path), name=f"{run.id}-checkpoint", **artifact))
        checkpoint.prune(self.output_dir, self.kind, self.args.keep_last, self.args.keep_every)

    def message(self, text):
        tqdm.write(text, file=sys.stdout)

    def close(self):
        self.bar.close()
        self.send(lambda run: run.finish())


def public(args):
    """The options as a dict fit to be stored: no keys."""
    return {name: value for name, value in vars(args).items() if name != "wandb_key"}
