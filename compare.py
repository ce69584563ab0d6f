"""Compare configurations of train_dmd2.py: all distil the same teacher for equal time or equal work, over several seeds."""

from support.config import COMPARE, DMD2, UserError, exit_on_error, make_folder, parse_args, public, writing

args = exit_on_error(parse_args, COMPARE, __doc__) if __name__ == "__main__" else None  # before torch: --help answers at once

import hashlib
import json
import signal
import subprocess
import sys
import tempfile
from argparse import Namespace
from contextlib import suppress
from math import isclose
from pathlib import Path
from statistics import mean, median

import torch
import yaml

import checkpoint
import train_dmd2
from data import load_dataset
from sampling import class_noise, sample_in_batches
from support.costs import count
from support.device import choose_device
from support.dry_run import DryRun
from support.images import save_diversity, to_uint8
from support.metrics import BETTER
from support.plots import plot_comparison, read_metrics

POINTS = 4  # evaluated checkpoints per run
# Options in which the runs of a configuration may differ.
FREE = {"output_dir", "seed", "step_number", "save_every", "keep_last", "keep_every", "sample_every", "device", "compile"}


def main(args):
    """Compares configurations with the options `args` from `parse_args(COMPARE, ...)`. Results of earlier calls are reused."""
    folder, device = Path(args.output_dir), choose_device(args)
    teacher_state = checkpoint.load_teacher(args.teacher_checkpoint)
    names = [Path(config).stem for config in args.configs]
    if len(set(names)) < len(names):
        raise UserError("--configs: two files have the same name; results are stored by name")
    options = {
        (name, seed): read_options(args, config, folder / name / f"seed_{seed}", seed)
        for name, config in zip(names, args.configs, strict=True)
        for seed in args.seeds
    }
    make_folder("--output_dir", folder)
    check_settings(args, folder)

    # ---- train and evaluate: seed by seed, so that a comparison that is stopped early has results for every configuration ---
    first = options[names[0], args.seeds[0]]
    real, teacher = measure(args, first, args.teacher_checkpoint, folder / "teacher")
    results = {name: [] for name in names}
    for seed in args.seeds:
        for name in names:
            train(options[name, seed], steps_of(args, folder / name, options[name, seed]))
            results[name].append(result_of(args, options[name, seed], real))
        write_report(args, folder, real, teacher, results)

    # ---- a page of pictures: 64 images of one class from each ---------------------------------------------------------------
    config = teacher_state["model_config"]
    dataset = load_dataset(first.dataset, first.data_dir, config["img_resolution"], config["img_channels"])
    noise, labels = class_noise(range(config["label_dim"]), 64, dataset.images.shape[1:], seed=0)
    real_labels = dataset.labels if config["label_dim"] else torch.zeros_like(dataset.labels)
    sets = [dataset.images]
    for file in (args.teacher_checkpoint, *(Path(options[name, args.seeds[0]].output_dir, "dmd2_final.pt") for name in names)):
        state = checkpoint.load(file)
        images = sample_in_batches(checkpoint.sampler(state)[0], checkpoint.network(state, file, device), noise, labels, 250)
        sets.append(to_uint8(images))
    label = save_diversity(folder / "pictures.png", sets, [real_labels, *[labels] * (len(sets) - 1)])
    what = f"class {dataset.class_names[label]} of " if config["label_dim"] else ""
    print(f"pictures.png: {what}{', '.join(['real images', 'teacher', *names])}, from left to right, three in a row")
    print(f"wrote compare.md, compare.json, compare.png and pictures.png to {folder}")


def machine(args):
    """The options for the machine that were given, as a dict. They go on to each script."""
    return {name: getattr(args, name) for name in ("device", "precision", "compile") if name in args.given}


def check_settings(args, folder):
    """Stores in `folder` what all its results have in common. Raises UserError if those that are there have something else."""
    settings = {name: getattr(args, name) for name in ("minutes", "forward_passes", "features", "num_samples")}
    digest = hashlib.sha256(Path(args.teacher_checkpoint).read_bytes()).hexdigest()  # it may have been trained anew
    settings["teacher_checkpoint"] = f"{args.teacher_checkpoint} (SHA-256 {digest[:8]})"
    path = folder / "settings.json"
    stored = json.loads(path.read_text()) if path.exists() else settings
    for name, value in settings.items():
        if stored.get(name, value) != value:
            raise UserError(f"{folder} holds results for {name} {stored[name]}, not {value}: choose another --output_dir")
    with writing(path):
        path.write_text(json.dumps(settings) + "\n")


def read_options(args, config, folder, seed):
    """The options of one run in `folder`. Raises UserError if the folder holds a run with other options."""
    argv = ["--config", config, "--teacher_checkpoint", args.teacher_checkpoint]
    options = parse_args(DMD2, None, [*argv, "--seed", str(seed), "--output_dir", str(folder)])
    vars(options).update(machine(args))
    if (folder / "config.yaml").exists():
        stored = yaml.safe_load((folder / "config.yaml").read_text())
        for name in public(options).keys() - FREE:
            value = getattr(options, name)
            if stored.get(name, value) != value:
                raise UserError(
                    f"{folder} was trained with {name} {stored[name]}, not {value}: delete it, or choose another --output_dir"
                )
    return options


def steps_of(args, folder, options):
    """The number of iterations of a configuration: that of a run already in `folder`, else as many as the time or work allows."""
    for stored in sorted(folder.glob("seed_*/config.yaml")):
        return yaml.safe_load(stored.read_text())["step_number"]
    if args.forward_passes:
        return max(1, round(args.forward_passes / passes_per_iteration(options)))
    steps = 20 * options.dfake_gen_update_ratio
    with tempfile.TemporaryDirectory() as scratch:  # only the second half of this trial is timed
        trial = {"output_dir": scratch, "step_number": steps, "log_every": steps // 2, "wandb": False}
        run("train_dmd2.py", public(options) | trial)
        pace = read_metrics(Path(scratch, "metrics.jsonl"))[-1]["images_per_second"] / options.batch_size
    return max(1, round(60 * args.minutes * pace))


def passes_per_iteration(options):
    """The counted cost of an iteration with `options`, in forward passes of a batch through the teacher's network."""
    options = Namespace(**vars(options) | {"dry_run": True})
    counted = DryRun(options, "dmd2")
    train_dmd2.main(options, counted)
    net = checkpoint.load_network(options.teacher_checkpoint)
    image = torch.zeros(1, *[net.config[name] for name in ("img_channels", "img_resolution", "img_resolution")])
    flops, _ = count(lambda: net(image, 1.0, torch.zeros(1, dtype=torch.long)))
    return counted.flops / (flops * options.batch_size)


def train(options, steps):
    """Trains or resumes the run of `options`. A finished run is left as it is."""
    folder = Path(options.output_dir)
    if not (folder / "dmd2_final.pt").exists():
        resume = "latest" if checkpoint.by_step(folder, "dmd2") else None
        changes = {"step_number": steps, "save_every": spacing(steps), "keep_every": spacing(steps), "sample_every": steps}
        run("train_dmd2.py", public(options) | changes | {"resume_from_checkpoint": resume})


def spacing(steps):
    """The iterations from one evaluated checkpoint to the next, in a run of `steps`."""
    return -(-steps // POINTS)


def measure(args, options, path, output_dir):
    """The rows of evaluate.py: for real images, and for the checkpoint at `path` or each one in that folder."""
    written = Path(output_dir, "evaluation.json")
    if not written.exists():
        flags = {"features": args.features, "num_samples": args.num_samples} | machine(args)
        data = {"dataset": options.dataset, "data_dir": options.data_dir}
        run("evaluate.py", {"checkpoint": str(path), "output_dir": str(output_dir)} | flags | data)
    return json.loads(written.read_text())["rows"]


def run(script, options):
    """Runs `script` with the dict `options`. If it fails, exits with its status; the script has printed the reason.

    On SIGINT or SIGTERM it waits for the script, which saves its work and ends.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump({name: value for name, value in options.items() if value is not None}, file)
        file.flush()
        process = subprocess.Popen([sys.executable, Path(__file__).with_name(script), "--config", file.name])
        before = signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
        while process.poll() is None:
            with suppress(KeyboardInterrupt):  # the terminal sends it to both
                process.wait()
        signal.signal(signal.SIGTERM, before)
    if process.returncode:
        sys.exit(process.returncode)


def result_of(args, options, real):
    """The results of one run: its evaluated checkpoints as `points`, and the mean `fake_lag` from `metrics.jsonl`.

    Raises UserError if real images come out unlike in `real`, the row of the teacher's evaluation: then the figures do not compare.
    """
    folder = Path(options.output_dir)
    own_real, *points = measure(args, options, folder, folder)
    if not isclose(own_real["frechet_distance"], real["frechet_distance"], rel_tol=1e-3):
        raise UserError(
            f"{folder / 'evaluation.json'} and that of the teacher differ for real images: they come from two judges, or "
            "from other options; delete the older one to measure it again"
        )
    last = points[-1]["step"]
    points = [point for point in points if point["step"] % spacing(last) == 0 or point["step"] == last]  # without those of stops
    rows = read_metrics(folder / "metrics.jsonl")
    lags = [row["fake_lag"] for row in rows[len(rows) // 2 :] if row.get("fake_lag") is not None]
    return {"seed": options.seed, "points": points, "fake_lag": mean(lags) if lags else None}


def write_report(args, folder, real, teacher, results):
    """Prints the table of medians and ranges over the seeds. Writes the table, all figures, and the plot of quality over time."""

    def cell(values):
        middle, low, high = (f"{value:.4g}" for value in (median(values), min(values), max(values)))
        return middle if low == high else f"{middle} ({low} to {high})"

    columns = [*BETTER, "evaluations", "step", "minutes"]
    lines = ["| | seeds | " + " | ".join(columns) + " | fake_lag |", "|---" * (len(columns) + 3) + "|"]
    for name, points in (("real, held out", [real]), ("teacher", [teacher]), *((name, None) for name in results)):
        runs = results.get(name, [])
        points = points or [one["points"][-1] for one in runs]
        cells = [cell([point[column] for point in points]) if column in points[0] else "" for column in columns]
        lags = [one["fake_lag"] for one in runs if one["fake_lag"] is not None]
        lines.append(" | ".join([f"| {name}", str(len(runs) or ""), *cells, cell(lags) if lags else ""]) + " |")
    print("\n".join(lines))
    budget = f"{args.minutes:g} minutes each" if args.minutes else f"{args.forward_passes:g} forward passes each"
    with writing(folder):
        (folder / "compare.md").write_text(f"{budget}; median (range) over the seeds\n\n" + "\n".join(lines) + "\n")
        found = {"budget": budget, "real": real, "teacher": teacher, "configurations": results}
        (folder / "compare.json").write_text(json.dumps(found, indent=2) + "\n")
    plot_comparison(teacher, results, folder / "compare.png")


if __name__ == "__main__":
    exit_on_error(main, args)
