"""Pictures: a run's curves, quality over training, and images side by side."""

import os
import sys
from statistics import median

import torch

from evaluation.metrics import RANKED
from run import read_metrics
from support.images import save_grid, to_float
from support.script import UserError, writing

# Panels of a run's curves: title, names in metrics.jsonl, scale of the axis.
PANELS = [
    ("teacher loss", ["loss"], "linear"),
    ("loss_dm", ["loss_dm"], "linear"),
    ("loss_fake_mean", ["loss_fake_mean"], "log"),
    ("GAN losses", ["gen_cls_loss", "guidance_cls_loss"], "linear"),
    ("GAN logits", ["real_logit", "fake_logit"], "linear"),
    ("norms before clipping", ["grad_norm", "generator_grad_norm", "guidance_grad_norm", "gan_grad_norm"], "log"),
    ("spread of the images", ["fake_std", "real_std"], "linear"),
]


def training_minutes(rows, batch_size, step):
    """Minutes of training up to `step`, at the speeds in `rows`, the lines of a `metrics.jsonl`.

    Lines without a speed above 0, as of a machine that was suspended, count at the speed of the line after.
    """
    minutes, before = 0.0, 0
    for row in rows:
        if (row.get("images_per_second") or 0) > 0:
            minutes += max(0, min(row["step"], step) - before) * batch_size / row["images_per_second"] / 60
            before = row["step"]
    return minutes


def new_figure(rows, columns, width, height):
    """A matplotlib figure and its axes, a flat list."""
    if "IPython" not in sys.modules:  # in a script that Jupyter starts, its backend may be missing
        os.environ.pop("MPLBACKEND", None)
    from matplotlib.figure import Figure  # pyplot would look for a screen

    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def plot_metrics(metrics_path, path):
    """Plots `metrics.jsonl`, one panel per kind of metric. Raises UserError if it holds none."""
    rows = read_metrics(metrics_path)
    if not rows:
        raise UserError(f"{metrics_path}: missing, or holds no metrics yet")
    present = {name for row in rows for name in row}
    panels = [panel for panel in PANELS if present & set(panel[1])]
    figure, axes = new_figure((len(panels) + 2) // 3 or 1, 3, 4.4, 3.2)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    for axis, (title, names, scale) in zip(axes, panels, strict=False):
        for name in names:
            if points := [(row["step"], row[name]) for row in rows if row.get(name) is not None]:
                axis.plot(*zip(*points, strict=True), label=name, linewidth=1)
        axis.set(title=title, xlabel="step", yscale=scale)
        if len(names) > 1:
            axis.legend()
    with writing(path):
        figure.savefig(path, dpi=100)


def plot_quality(path, results, teacher=None):
    """Plots quality over the minutes of training, or over steps if no time is known.

    results: a dict from names to lists of runs, which are lists of rows of evaluate.py, a row per checkpoint. Each name
    has a line, the median over its runs, and a point per row with its noise. teacher: its row, drawn as a dashed line.
    """
    timed = all("minutes" in row for runs in results.values() for rows in runs for row in rows)
    over, label = ("minutes", "minutes of training") if timed else ("step", "step")
    figure, axes = new_figure(1, len(RANKED), 4.5, 4)
    for axis, metric in zip(axes, RANKED, strict=True):
        if teacher:
            axis.axhline(teacher[metric], color="black", linestyle="--", linewidth=1, label="teacher")
        for name, runs in results.items():
            rows = [row for run in runs for row in run]
            moments = [[row for row in rows if row["step"] == step] for step in sorted({row["step"] for row in rows})]
            middle = [[median(row[key] for row in moment) for moment in moments] for key in (over, metric)]
            (line,) = axis.plot(*middle, label=name)
            points = [[row[key] for row in rows] for key in (over, metric)]
            axis.errorbar(*points, [row["noise"][metric] for row in rows], fmt=".", color=line.get_color(), capsize=2)
        axis.set(title=metric, xlabel=label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    with writing(path):
        figure.savefig(path, dpi=100)


def save_comparison(path, teacher_images, student_images, labels):
    """Writes a PNG with two rows per class, at most ten: the teacher's uint8 images over the student's."""
    classes = labels.unique()[:10]
    columns = min([16, *((labels == label).sum().item() for label in classes)])
    index = [(labels == label).nonzero().flatten()[:columns] for label in classes]
    rows = [images[row] for row in index for images in (teacher_images, student_images)]
    save_grid(path, to_float(torch.cat(rows)), columns=columns)


def save_diversity(path, sets, labels):
    """Writes a PNG with 8x8 images of one class from each of the `sets` (uint8 `[N, C, H, W]`, `labels` `[N]`).

    It is the class in which the last set varies least relative to the first. Returns that class.
    """

    def spread(index, label):
        part = sets[index][labels[index] == label].float()
        return part.var(0).sum().item() if len(part) > 1 else float("inf")

    label = min(labels[0].unique().tolist(), key=lambda label: spread(-1, label) / max(spread(0, label), 1e-9))
    grids = [to_float(images[of == label][:64]) for images, of in zip(sets, labels, strict=True)]
    blank = torch.ones_like(grids[0][:1])
    save_grid(path, *[torch.cat([grid, blank.expand(64 - len(grid), -1, -1, -1)]) for grid in grids], columns=8)
    return label
