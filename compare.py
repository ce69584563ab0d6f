"""Compare configurations of train_dmd2.py: all distil one teacher with equal work or steps, over several seeds."""

import hashlib
import sys
import tempfile
from math import isclose
from pathlib import Path
from statistics import median

import torch
import yaml

import checkpoint
import evaluate
import train_dmd2
from evaluation.costs import forward_flops, iteration_flops
from evaluation.metrics import BETTER
from evaluation.plots import plot_quality
from support.device import MACHINE, choose_device
from support.options import Option, count, number, parse_args, path, positive, public
from support.script import UserError, make_folder, run_script, writing

OPTIONS = {
    "what to compare": [
        Option("teacher_checkpoint", "./log/checkpoints/teacher/teacher_final.pt", path, "the teacher to distil"),
        Option("configs", ["config_train1.yaml"], path, "option files for train_dmd2.py, one per configuration", "+"),
        Option("seeds", [0, 1, 2], number(0, 2**31 - 1, whole=True), "seeds of each configuration's runs", "+"),
        Option("output_dir", "./log/compare", path, "where results go; finished parts are not repeated"),
    ],
    "how much": [
        Option("forward_passes", None, positive, "equal work: FLOPs of so many forward passes of a batch per run"),
        Option("step_number", None, count, "equal steps: iterations per run"),
        Option("num_samples", 2000, number(4, whole=True), "images per checkpoint that evaluate.py generates"),
        Option("features", "classifier", evaluate.FEATURES, "of evaluate.py's Frechet distance"),
    ],
    "machine": MACHINE[1:],  # all but the seed
}
POINTS = 4  # evaluated checkpoints per run
# Options in which the runs of a configuration may differ.
FREE = {o.name for heading in ("run", "machine", "log", "Weights & Biases") for o in train_dmd2.OPTIONS[heading]}
FREE -= {"batch_size", "grad_accum", "precision"}


def main(argv=None):
    """Compares configurations with the options in `argv`. Results of earlier calls are reused."""
    args = parse_args(OPTIONS, __doc__, argv)
    if (args.forward_passes is None) == (args.step_number is None):
        raise UserError("give --forward_passes, for equal work, or --step_number")
    choose_device(args)  # a wrong one is told at once
    folder = Path(args.output_dir)
    state = checkpoint.load_teacher(args.teacher_checkpoint)
    net = checkpoint.network(state, args.teacher_checkpoint, "meta")
    options, steps = {}, {}
    for config in args.configs:  # a mistake in any is told before the first training
        if (name := Path(config).stem) in options:
            raise UserError("--configs: two files have the same name; results are stored by name")
        words = ["--config", config, "--teacher_checkpoint", args.teacher_checkpoint]
        options[name] = parse_args(train_dmd2.OPTIONS, None, words)
        vars(options[name]).update(machine(args))
        model = train_dmd2.build_model(options[name], net, "meta")
        work = args.forward_passes and args.forward_passes * forward_flops(net)  # per image, like iteration_flops
        steps[name] = args.step_number or max(1, round(work / iteration_flops(options[name], model)))
    # All are measured against the same real images. With `--dataset none` a configuration has none.
    with_images = next((vars(of_run) for of_run in options.values() if of_run.dataset != "none"), state["config"])
    args.dataset, args.data_dir = with_images.get("dataset"), with_images.get("data_dir")
    del state  # mainly to free its optimizer's moments
    make_folder("--output_dir", folder)
    check_settings(args, folder, options)

    # ---- train and evaluate: seed by seed, so that a comparison that is stopped has results of each configuration ----
    real, teacher = measure(args, args.teacher_checkpoint, folder / "teacher")
    results = {name: [] for name in options}
    for seed in args.seeds:
        for name in options:
            points = points_of(args, options[name], seed, steps[name], folder / name / f"seed_{seed}", real)
            results[name].append({"seed": seed, "points": points})
        write_report(args, folder, real, teacher, results)
    print(f"wrote compare.md, compare.json and compare.png to {folder}")


def machine(args):
    """The options for the machine that were given, as a dict. They go on to each script."""
    return {name: getattr(args, name) for name in ("device", "precision", "compile") if name in args.given}


def check_settings(args, folder, options):
    """Stores in `folder` what its results are made with. Raises UserError if those that are there differ in it."""
    common = {name: getattr(args, name) for name in ("forward_passes", "step_number", "features", "num_samples")}
    settings = {".": common | {"teacher_checkpoint": identity(args.teacher_checkpoint)}}
    for name, of_runs in options.items():
        settings[name] = {option: value for option, value in public(of_runs).items() if option not in FREE}
        settings[name]["generator_checkpoint"] = identity(of_runs.generator_checkpoint)
    stored = evaluate.read_results(folder / "settings.json") or {}
    for name in settings.keys() & stored.keys():
        for option, value in settings[name].items():
            if (folder / name).exists() and (before := stored[name].get(option, value)) != value:
                made = f"{folder / name} holds results for {option} {before}, not {value}"
                raise UserError(f"{made}: delete it, or choose another --output_dir")
    evaluate.write_results(folder / "settings.json", stored | settings)


def identity(file):
    """`file` with a digest of its content, as a network may have been trained anew; None for None."""
    return file and f"{file} (SHA-256 {hashlib.sha256(Path(file).read_bytes()).hexdigest()[:8]})"


def points_of(args, options, seed, steps, folder, real):
    """The rows of a run's evaluated checkpoints, without those of a stop. The run is trained unless it is finished."""
    every = -(-steps // POINTS)
    if not (folder / "dmd2_final.pt").exists():
        of_run = {"seed": seed, "output_dir": str(folder), "resume_from_checkpoint": "auto", "overwrite": False}
        of_run |= {"step_number": steps, "save_every": every, "keep_last": POINTS + 10, "sample_every": steps}
        run(train_dmd2, public(options) | of_run)
    own_real, *points = measure(args, folder, folder)
    if not isclose(own_real["frechet_distance"], real["frechet_distance"], rel_tol=1e-3):
        differ = f"{folder / 'evaluation.json'} and that of the teacher differ for real images"
        raise UserError(f"{differ}: two classifiers, or other options; delete the older one to measure it again")
    return [point for point in points if point["step"] % every == 0 or point["step"] == steps]


def measure(args, path, output_dir):
    """The rows of evaluate.py: for real images, and for the checkpoint at `path` or each one in that folder."""
    written = Path(output_dir, "evaluation.json")
    if not evaluate.read_results(written):
        of_call = {name: getattr(args, name) for name in ("dataset", "data_dir", "features", "num_samples")}
        run(evaluate, of_call | machine(args) | {"checkpoint": str(path), "output_dir": str(output_dir)})
    return evaluate.read_results(written)["rows"]


def run(script, options):
    """Calls the module `script` with the dict `options`. If it was stopped by a signal, ends with that status."""
    if options.get("compile"):
        torch.compiler.reset()  # torch limits the networks that a process compiles
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump({name: value for name, value in options.items() if value is not None}, file)
        file.flush()
        if status := script.main(["--config", file.name]):
            sys.exit(status)


def write_report(args, folder, real, teacher, results):
    """Writes the table of medians and ranges over the seeds, all metrics, and the plot of quality over time."""

    def cell(values):
        middle, low, high = (f"{value:.4g}" for value in (median(values), min(values), max(values)))
        return middle if low == high else f"{middle} ({low} to {high})"

    budget = f"{args.step_number} steps each" if args.step_number else f"{args.forward_passes:g} forward passes each"
    columns = [*BETTER, "evaluations", "step", "minutes"]
    lines = [f"{budget}; median (range) over the seeds", "", "| | seeds | " + " | ".join(columns) + " |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    last = {name: [one["points"][-1] for one in runs] for name, runs in results.items()}
    for name, rows in {"real, held out": [real], "teacher": [teacher], **last}.items():
        cells = [cell([row[column] for row in rows]) if column in rows[0] else "" for column in columns]
        lines.append(" | ".join([f"| {name}", str(len(rows)) if name in last else "", *cells]) + " |")
    print(report := "\n".join(lines) + "\n")
    with writing(folder / "compare.md"):
        (folder / "compare.md").write_text(report)
    found = {"budget": budget, "real": real, "teacher": teacher, "configurations": results}
    evaluate.write_results(folder / "compare.json", found)
    curves = {name: [one["points"] for one in runs] for name, runs in results.items()}
    plot_quality(folder / "compare.png", curves, teacher)


if __name__ == "__main__":
    run_script(main)
