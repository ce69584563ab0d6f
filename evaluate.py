"""Measure a generator, beside its teacher where one is named: Frechet distance, class accuracy, speed; or plot a run's curves."""

from support.config import EVALUATE, UserError, exit_on_error, make_folder, parse_args, writing

args = exit_on_error(parse_args, EVALUATE, __doc__) if __name__ == "__main__" else None  # before torch: --help answers at once

import json
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

import checkpoint
from data import load_dataset
from sampling import sample_in_batches
from support import features
from support.images import save_comparison, to_uint8
from support.metrics import scores
from support.parallel import rank
from support.plots import loss_ends, plot_metrics, plot_steps
from support.training import autocast, choose_device, compile_networks


def main(args):
    """Measures by the options `args`, as `parse_args(EVALUATE, ...)` gives them."""
    device = choose_device(args)
    path = Path(args.checkpoint)
    output_dir = Path(args.output_dir or (path if path.is_dir() else path.parent))
    if args.plot:
        make_folder("--output_dir", output_dir)
        plot_metrics((path if path.is_dir() else path.parent) / "metrics.jsonl", output_dir / "curves.png")
        print(f"wrote {output_dir / 'curves.png'}")
        return

    models = load_models(args, path, device)
    shape = models[0]["net"].config
    name, data_dir = args.dataset or models[-1]["config"].get("dataset"), args.data_dir or models[-1]["config"].get("data_dir")
    if not name or not data_dir:
        raise UserError(f"{models[-1]['file']} does not say what it was trained on: name that by --dataset and --data_dir")
    dataset = load_dataset(name, data_dir, shape["img_resolution"], shape["img_channels"], device)
    if len(dataset.class_names) != shape["label_dim"]:
        raise UserError(f"--dataset {name} has {len(dataset.class_names)} classes; {models[-1]['file']} knows {shape['label_dim']}")
    make_folder("--output_dir", output_dir)

    # ---- the judge, and what it makes of real images --------------------------------------------------------------------
    rows = []
    if args.features == "classifier":
        measure, accuracy = features.classifier(dataset, features.cache_path(name, data_dir, shape), device)
        print(f"judge: a classifier trained on four fifths of the real images; accuracy {accuracy:.4f} on the fifth held out")
        training_part, held_out = features.split(dataset)
        real = measure(training_part.images)[0]
        judged = measure(held_out.images)
        if not rank():
            rows.append({"name": "real, held out"} | scores(judged, held_out.labels, real, args))
    else:
        measure = features.inception(args.inception_weights, device)
        real = measure(dataset.images)[0]

    # ---- the models -----------------------------------------------------------------------------------------------------
    labels = generate(args, models, dataset.images.shape[1:], device)
    for model in models:
        row = {"name": f"{model['kind']}, step {model['step']}", "checkpoint": model["file"], "step": model["step"]}
        rate = 1 / median(model["seconds"])
        row |= {"evaluations": model["evaluations"], "seconds": args.num_samples / rate, "images_per_second": rate}
        judged = measure(model["images"])
        if not rank():
            rows.append(row | scores(judged, labels, real, args))
    if not rank():
        report(args, rows, models, labels, device, output_dir)


def load_models(args, path, device):
    """What is measured, a dict each: the teacher, where one is named, then each checkpoint of the folder `path`, or the file."""
    found = checkpoint.by_step(path, "dmd2") or checkpoint.by_step(path, "teacher")
    files = list(dict(found).values()) if path.is_dir() else [path]
    if not files:
        raise UserError(f"--checkpoint {path}: no checkpoints in this folder")
    models = []
    for file in [args.teacher_checkpoint] * bool(args.teacher_checkpoint) + files:
        state = checkpoint.load(file)
        if file is args.teacher_checkpoint:
            checkpoint.check_teacher(state, file)
        sampler, evaluations = checkpoint.sampler(state, args.steps)
        net = checkpoint.network(state, file, device)
        compile_networks(args, net)
        models.append({"file": str(file), "kind": checkpoint.kind(state), "step": state["step"], "evaluations": evaluations})
        models[-1] |= {"net": net, "sampler": sampler, "config": state["config"], "images": [], "seconds": []}
        differs = [k for k in ("img_resolution", "img_channels", "label_dim") if net.config[k] != models[0]["net"].config[k]]
        if differs:
            raise UserError(f"{file}: another {differs[0]} than {models[0]['file']}; they cannot be compared")
    return models


def generate(args, models, image_shape, device):
    """Gives each model its `images`, uint8 `[N, C, H, W]`, and each batch's `seconds` per image. Returns the labels `[N]`."""
    generator = torch.Generator().manual_seed(args.seed)
    labels = torch.randint(models[0]["net"].label_dim, (args.num_samples,), generator=generator)
    for batch_labels in labels.split(args.batch_size):
        noise = torch.randn(len(batch_labels), *image_shape, generator=generator)
        for model in models:  # in turn, from the same noise, so that changes of the machine's speed meet all alike
            start = perf_counter()
            with autocast(args, device):
                images = sample_in_batches(model["sampler"], model["net"], noise, batch_labels, args.batch_size)
            model["seconds"].append((perf_counter() - start) / len(images))
            model["images"].append(to_uint8(images))
    for model in models:
        model["images"] = torch.cat(model["images"])
    return labels


def report(args, rows, models, labels, device, output_dir):
    """Prints the table, names the best checkpoint, compares with the teacher; writes `evaluation.json` and the pictures."""
    result = {"features": args.features, "num_samples": args.num_samples, "device": str(device), "rows": rows}
    columns = [key for key in rows[-1] if key not in ("checkpoint", "step", "name")]
    print(f"{'':24}" + "".join(f"{column:>19}" for column in columns))
    for row in rows:
        cells = [f"{row[c]:.4g}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in columns]
        print(f"{row['name']:24}" + "".join(f"{cell:>19}" for cell in cells))

    for folder in dict.fromkeys(Path(model["file"]).parent for model in models):
        if (folder / "metrics.jsonl").exists():
            print(f"losses of {folder}: {loss_ends(folder / 'metrics.jsonl')}")

    compared = models[bool(args.teacher_checkpoint) :]
    evaluated = rows[-len(compared) :]
    best = min(evaluated, key=lambda row: row["frechet_distance"])
    if len(compared) > 1:
        plot_steps(evaluated, output_dir / "evaluation.png")
        result["best"] = best["checkpoint"]
        print(f"best: {best['checkpoint']}; curve in {output_dir / 'evaluation.png'}")
    if args.teacher_checkpoint:
        teacher = rows[-len(compared) - 1]
        result["quality_ratio"] = best["frechet_distance"] / teacher["frechet_distance"]
        result["speed_ratio"] = best["images_per_second"] / teacher["images_per_second"]
        print(
            f"{best['name']}: {result['quality_ratio']:.3f} times the teacher's Frechet distance, "
            f"{result['speed_ratio']:.1f} times its images per second"
        )
        student = compared[evaluated.index(best)]["images"]
        save_comparison(output_dir / "comparison.png", models[0]["images"], student, labels)
    with writing(output_dir / "evaluation.json"):
        (output_dir / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {output_dir / 'evaluation.json'}")


if __name__ == "__main__":
    exit_on_error(main, args)
