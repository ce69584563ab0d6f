"""Plots: a run's curves, and quality over training."""

import json
from statistics import median

import matplotlib

from support.config import UserError, writing

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt

# Panels of a run's curves: title, names in metrics.jsonl, logarithmic axis.
PANELS = [
    ("teacher loss", ["loss"], False),
    ("loss_dm", ["loss_dm"], False),
    ("size of the DMD2 gradient", ["dmtrain_gradient_norm"], False),
    ("loss_fake_mean", ["loss_fake_mean"], True),
    ("gradient norms, before clipping", ["grad_norm", "generator_grad_norm", "guidance_grad_norm", "gan_grad_norm"], True),
    ("fake_lag", ["fake_lag"], False),
    ("GAN losses", ["gen_cls_loss", "guidance_cls_loss"], False),
    ("GAN logits", ["real_logit", "fake_logit"], False),
    ("spread of the images", ["fake_std", "real_std"], False),
]
CURVES = ["frechet_distance", "pixel_frechet_distance", "recall", "coverage"]  # of checkpoints: quality and variety


def read_metrics(path):
    """The lines of a `metrics.jsonl` as dicts. Raises UserError if there are none."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # a killed run may leave an incomplete line
    if not rows:
        raise UserError(f"{path}: holds no metrics yet")
    return rows


def curve(rows, name):
    """The points (step, value) of one metric."""
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def training_minutes(rows, batch_size, step):
    """Minutes of training up to the last of `rows`, the lines of a `metrics.jsonl`, that is not after `step`."""
    minutes, before = 0.0, 0
    for row in rows:
        if row["step"] <= step:
            minutes += (row["step"] - before) * batch_size / row["images_per_second"] / 60
            before = row["step"]
    return minutes


def loss_ends(rows):
    """Where each loss in `rows`, the lines of a `metrics.jsonl`, started and ended, in words."""
    curves = {name: curve(rows, name) for name in sorted({name for row in rows for name in row if "loss" in name})}
    return ", ".join(f"{name} {points[0][1]:.3g} -> {points[-1][1]:.3g}" for name, points in curves.items() if points)


def plot_metrics(metrics_path, path):
    """Plots `metrics.jsonl`, one panel per kind of metric. Raises UserError if the file is missing."""
    rows = read_metrics(metrics_path)
    present = {name for row in rows for name in row}
    panels = [panel for panel in PANELS if present & set(panel[1])]
    lines = (len(panels) + 2) // 3
    figure, axes = plt.subplots(lines, 3, figsize=(13, 3.2 * lines), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, names, logarithmic) in zip(axes.flat, panels, strict=False):
        for name in names:
            points = curve(rows, name)
            if points:
                axis.plot(*zip(*points, strict=True), label=name, linewidth=1)
        axis.set_title(title)
        axis.set_xlabel("step")
        if logarithmic:
            axis.set_yscale("log")
        if len(names) > 1:
            axis.legend()
    save(figure, path)


def plot_checkpoints(rows, path):
    """Plots the figures of checkpoints (rows of evaluate.py) over the minutes of training, or the steps if no time is known.

    Error bars are the figures' noise.
    """
    over, label = ("minutes", "minutes of training") if all("minutes" in row for row in rows) else ("step", "step")
    figure, axes = plt.subplots(1, len(CURVES), figsize=(4 * len(CURVES), 3.2), layout="constrained")
    for axis, name in zip(axes, CURVES, strict=True):
        values, noise = [row[name] for row in rows], [row["noise"][name] for row in rows]
        axis.errorbar([row[over] for row in rows], values, noise, marker="o", capsize=3)
        axis.set_title(name)
        axis.set_xlabel(label)
    save(figure, path)


def plot_comparison(teacher, results, path):
    """Plots quality over minutes of training: a line per configuration, the median over its seeds, and a point per checkpoint.

    teacher: its row of evaluate.py, drawn as a dashed line; results: a dict from each configuration's name to its runs, from
    compare.py.
    """
    figure, axes = plt.subplots(1, len(CURVES), figsize=(4.5 * len(CURVES), 4), layout="constrained")
    for axis, figure_name in zip(axes, CURVES, strict=True):
        axis.axhline(teacher[figure_name], color="black", linestyle="--", linewidth=1, label="teacher")
        for name, runs in results.items():
            points = [point for one in runs for point in one["points"]]
            if points:
                moments = [[p for p in points if p["step"] == step] for step in sorted({p["step"] for p in points})]
                middle = [[median(p[key] for p in moment) for moment in moments] for key in ("minutes", figure_name)]
                (line,) = axis.plot(*middle, label=name)
                single = [[p[key] for p in points] for key in ("minutes", figure_name)]
                axis.plot(*single, ".", color=line.get_color(), markersize=4)
        axis.set_title(figure_name)
        axis.set_xlabel("minutes of training")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    save(figure, path)


def save(figure, path):
    with writing(path):
        figure.savefig(path, dpi=100)
    plt.close(figure)
