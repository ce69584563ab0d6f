"""What a run tells: a progress bar, `metrics.jsonl`, sample grids, and Weights & Biases where it is wanted."""

import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

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
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(path)


class Logger:
    """Metrics of one run. `log` costs no synchronisation with the device except every `log_every` steps, when it writes means.

    args: the script's options; start_step: the step that a resumed run goes on from, whose later lines are dropped.
    """

    def __init__(self, args, start_step=0):
        self.args = args
        self.output_dir = Path(args.output_dir)
        (self.output_dir / "samples").mkdir(parents=True, exist_ok=True)
        self.metrics_path = self.output_dir / "metrics.jsonl"
        kept = []
        if start_step and self.metrics_path.exists():
            kept = [line for line in self.metrics_path.read_text().splitlines() if json.loads(line)["step"] <= start_step]
        self.metrics_path.write_text("".join(line + "\n" for line in kept))

        self.bar = tqdm(total=args.step_number, initial=start_step, unit="step", disable=None, dynamic_ncols=True)
        self.sums, self.counts = {}, {}
        self.last_step, self.last_time = start_step, time.perf_counter()
        self.last_wandb_step = start_step
        self.wandb_run = None
        if args.wandb:
            import wandb  # only where it is wanted: it takes a second, and need not be installed

            Path(args.wandb_dir).mkdir(parents=True, exist_ok=True)
            self.wandb_run = wandb.init(
                project=args.wandb_project,
                name=args.wandb_run_name,
                mode=args.wandb_mode,
                dir=args.wandb_dir,
                config=public(args),
                # W&B records the command line in a run's metadata: not when the key stands in it.
                settings=wandb.Settings(api_key=args.wandb_key, x_disable_meta=args.wandb_key is not None),
            )

    def log(self, step, metrics):
        """Adds the step's `metrics` (0-dimensional tensors or numbers) to the running means, written every `log_every` steps."""
        for name, value in metrics.items():
            value = value.detach() if torch.is_tensor(value) else value
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.bar.update()
        if step % self.args.log_every and step != self.args.step_number:
            return

        means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        now = time.perf_counter()
        images_per_second = (step - self.last_step) * self.args.batch_size / (now - self.last_time)
        self.sums, self.counts, self.last_step, self.last_time = {}, {}, step, now
        with open(self.metrics_path, "a") as file:
            print(json.dumps({"step": step, **means, "images_per_second": round(images_per_second, 1)}), file=file)

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
        if self.wandb_run and step - self.last_wandb_step >= self.args.wandb_log_every:
            self.wandb_run.log({**means, "images_per_second": images_per_second}, step=step)
            self.last_wandb_step = step

    def wants_samples(self, step):
        return step % self.args.sample_every == 0 or step == self.args.step_number or self.wandb_wants("samples", step)

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

        self.wandb_run.log({name: wandb.Image(str(path))}, step=step)

    def checkpoint(self, path):
        """Tells that a checkpoint was written, and sends it to W&B where that is wanted."""
        self.message(f"saved {path}")
        if self.wandb_run and self.args.wandb_log_checkpoints:
            self.wandb_run.log_artifact(str(path), name=f"{self.wandb_run.id}-checkpoint", type="model", aliases=[Path(path).stem])

    def message(self, text):
        tqdm.write(text, file=sys.stdout)

    def close(self):
        self.bar.close()
        if self.wandb_run:
            self.wandb_run.finish()


def public(args):
    """The options as a dict fit to be stored: no keys."""
    return {name: value for name, value in vars(args).items() if name != "wandb_key"}
