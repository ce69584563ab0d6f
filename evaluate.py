"""Compare a generator with its teacher and real images in quality, diversity, copying and speed; or plot a run's curves."""

from support.config import EVALUATE, UserError, exit_on_error, make_folder, parse_args, writing

args = exit_on_error(parse_args, EVALUATE, __doc__) if __name__ == "__main__" else None  # before torch: --help answers at once

import json
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch

import checkpoint
from data import check_no_class_is_empty, load_dataset, subset
from sampling import random_stream, sample_in_batches
from support import features, metrics
from support.device import autocast, choose_device, compile_networks
from support.images import save_comparison, save_diversity, to_uint8
from support.parallel import rank
from support.plots import loss_ends, plot_checkpoints, plot_metrics, read_metrics, training_minutes

MOST_REAL = 100_000  # most real images used: more would change little and take much memory


def main(args):
    """Evaluates with the options `args` from `parse_args(EVALUATE, ...)`."""
    device = choose_device(args)
    path = Path(args.checkpoint)
    output_dir = Path(args.output_dir or (path if path.is_dir() else path.parent))
    if args.plot:
        make_folder("--output_dir", output_dir)
        plot_metrics((path if path.is_dir() else path.parent) / "metrics.jsonl", output_dir / "curves.png")
        print(f"wrote {output_dir / 'curves.png'}")
        return

    place = torch.device("cpu") if device.type == "mps" else device  # for the figures, which need float64: mps lacks it

    models = load_models(args, path, device)
    fid_reference = [part.to(place) for part in read_fid_reference(args.fid_reference)] if args.fid_reference else None
    shape = models[0]["net"].config
    name, data_dir = args.dataset or models[-1]["config"].get("dataset"), args.data_dir or models[-1]["config"].get("data_dir")
    if not name or not data_dir:
        raise UserError(f"{models[-1]['file']} does not say what it was trained on: give --dataset and --data_dir")
    dataset = load_dataset(name, data_dir, shape["img_resolution"], shape["img_channels"], device)
    classes, conditional = len(dataset.class_names), shape["label_dim"] > 0
    if conditional and classes != shape["label_dim"]:
        raise UserError(f"--dataset {name} has {classes or 'no'} classes; {models[-1]['file']} knows {shape['label_dim']}")
    if args.features == "classifier" and classes < 2:
        raise UserError(f"--features classifier: {data_dir} has no classes to train one on; use --features inception, or pixels")
    if conditional:
        check_no_class_is_empty(data_dir, dataset.class_names, dataset.labels)
    make_folder("--output_dir", output_dir)
    if len(dataset.labels) > MOST_REAL:
        print(f"real images: {MOST_REAL} of {len(dataset.labels)}, a fixed random subset")
        dataset = subset(dataset, torch.randperm(len(dataset.labels), generator=random_stream(0, 0))[:MOST_REAL].sort().values)

    # ---- feature extractors ---------------------------------------------------------------------------------------------
    inception = features.inception(args.inception_weights, device) if args.features == "inception" else None
    judge = accuracy = None
    if conditional or args.features == "classifier":
        judge, accuracy = features.classifier(dataset, features.cache_path(name, data_dir, shape), device)
        print(f"judge: a classifier trained on four fifths of the real images; accuracy {accuracy:.4f} on the held-out fifth")

    def see(images):
        """The inputs of the figures, named as in `metrics.figures`. All processes must call it together."""
        pixels, small = features.pixels(images)
        seen = {"features": small, "neighbours": small, "pixels": pixels, "small": small}
        if judge:
            judged, logits = judge(images)
            seen |= {"logits": logits} if conditional else {}
            seen |= {"features": judged} if args.features == "classifier" else {}
        if inception:
            seen["features"], seen["inception_logits"] = inception(images)
            seen["neighbours"] = seen["features"]
        return {part: rows.to(place) for part, rows in seen.items()}

    # ---- real images ----------------------------------------------------------------------------------------------------
    training_part, held_out = features.split(dataset)
    if not conditional:
        held_out.labels.zero_()  # like the labels of the models' images
    size = min(args.num_samples, len(held_out.labels))  # as many real as generated images for every figure
    real, seen = see(training_part.images), see(held_out.images)
    reference = {
        "features": metrics.statistics(real["features"]),
        "small": metrics.statistics(real["small"]),
        "neighbours": real["neighbours"][: metrics.NEIGHBOURS],
        "training": real["small"],
        "copied_below": metrics.nearest(seen["small"], real["small"]).quantile(0.01),
    }
    rows = [] if rank() else [{"name": "real, held out"} | measured(seen, held_out.labels.to(place), reference, size)]
    if inception and fid_reference is None:
        fid_reference = metrics.statistics(inception(dataset.images)[0].to(place))

    # ---- the models -----------------------------------------------------------------------------------------------------
    files = dict.fromkeys(Path(model["file"]).with_name("metrics.jsonl") for model in models)
    logs = {file.parent: read_metrics(file) for file in files if file.exists() and file.stat().st_size}
    labels = generate(args, models, dataset.images.shape[1:])
    for model in models:
        seen = see(model["images"])
        if rank():
            continue
        row = {"name": f"{model['kind']}, step {model['step']}", "checkpoint": model["file"], "step": model["step"]}
        log, batch_size = logs.get(Path(model["file"]).parent), model["config"].get("batch_size")
        if log and batch_size:
            row["minutes"] = training_minutes(log, batch_size, model["step"])
        row |= measured(seen, labels.to(place), reference, size)
        if inception:
            draws = seen["features"].split(args.num_samples)
            row["fid_draws"] = [metrics.frechet_distance(metrics.statistics(draw), fid_reference) for draw in draws]
            row["fid"] = min(row["fid_draws"])  # EDM publishes the least
        if args.inception_score:
            row["inception_score"] = metrics.inception_score(seen["inception_logits"])
        row |= {"evaluations": model["evaluations"], "images_per_second": 1 / median(model["seconds"])}
        rows.append(row)
    if rank():
        return

    # ---- report ---------------------------------------------------------------------------------------------------------
    result = {"features": args.features, "judge_accuracy": accuracy, "num_samples": args.num_samples, "repeats": args.repeats}
    result |= {"images_per_figure": size, "device": str(device), "rows": rows}
    print_table(rows)
    for folder, log in logs.items():
        print(f"losses of {folder}: {loss_ends(log)}")
    first = 2 if args.teacher_checkpoint else 1  # row of the first checkpoint, after real images and teacher
    chosen = first + metrics.best(rows[first:])
    if len(rows) - first > 1:
        plot_checkpoints(rows[first:], output_dir / "evaluation.png")
        result["best"] = rows[chosen]["checkpoint"]
        print(f"best by the mean rank in both Frechet distances, recall and coverage: {result['best']}; curves in evaluation.png")
    sets = [held_out.images.cpu(), *(model["images"] for model in models)]
    if args.teacher_checkpoint:
        student, teacher = rows[chosen], rows[1]
        result["verdict"] = metrics.verdict(student, teacher, rows[0])
        for how, names in result["verdict"].items():
            print(
                f"{student['name']}: {how}{' as' if how == 'as good' else ' than'} its teacher in {', '.join(names) or 'nothing'}"
            )
        result["speed_ratio"] = student["images_per_second"] / teacher["images_per_second"]
        print(f"{student['name']}: {result['speed_ratio']:.1f} times its teacher's images per second")
        rows_of = labels if conditional else torch.arange(len(labels)) % 10
        save_comparison(output_dir / "comparison.png", sets[1], sets[chosen], rows_of)
    shown = [0, *range(1, first), chosen]
    label = save_diversity(
        output_dir / "diversity.png", [sets[i] for i in shown], [labels if i else held_out.labels.cpu() for i in shown]
    )
    what = f"class {dataset.class_names[label]}, " if conditional else ""
    print(f"diversity.png: {what}{', '.join(rows[i]['name'] for i in shown)} from left to right")
    with writing(output_dir / "evaluation.json"):
        (output_dir / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {output_dir / 'evaluation.json'}")


def load_models(args, path, device):
    """A dict per model to evaluate: the teacher, if one is given, then each checkpoint in the folder `path`, or the file `path`."""
    found = checkpoint.by_step(path, "dmd2") or checkpoint.by_step(path, "teacher")
    files = list(dict(found).values()) if path.is_dir() else [path]
    if not files:
        raise UserError(f"--checkpoint {path}: no checkpoints in this folder")
    models = []
    for file in [args.teacher_checkpoint] * bool(args.teacher_checkpoint) + files:
        state = checkpoint.load_teacher(file) if file is args.teacher_checkpoint else checkpoint.load(file)
        sampler, evaluations = checkpoint.sampler(state, args.steps)
        sampler = partial(sample_pixels, sampler)
        net = checkpoint.network(state, file, device)
        compile_networks(args, net)
        models.append({"file": str(file), "kind": checkpoint.kind(state), "step": state["step"], "evaluations": evaluations})
        models[-1] |= {"net": net, "sampler": sampler, "config": state["config"], "images": [], "seconds": []}
        differs = [k for k in ("img_resolution", "img_channels", "label_dim") if net.config[k] != models[0]["net"].config[k]]
        if differs:
            raise UserError(f"{file}: its {differs[0]} differs from that of {models[0]['file']}; they cannot be compared")
    return models


def sample_pixels(sampler, net, noise, labels):
    """The sampler's images as uint8: torchrun's processes exchange them, and float32 would be four times as large."""
    return to_uint8(sampler(net, noise, labels))


def read_fid_reference(path, size=2048):
    """The published statistics of real images, (mu `[size]`, sigma `[size, size]`). Raises UserError if the file has none."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mean, covariance = (torch.from_numpy(arrays[name]).double() for name in ("mu", "sigma"))
        if mean.dim() != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError("their shapes do not match")
        if len(mean) != size:
            raise ValueError(f"these have {len(mean)} features; Inception has {size}")
    except OSError as error:
        raise UserError(f"--fid_reference {path}: {error.strerror or error}") from None
    except Exception as error:  # any file may be given
        raise UserError(f"--fid_reference {path}: needs an .npz file with mu [D] and sigma [D, D] ({error})") from None
    return mean, covariance


def measured(seen, labels, reference, size):
    values, noise = metrics.figures_with_noise(seen, labels, reference, size)
    return {"images": len(labels) // size * size, **values, "noise": noise}


def generate(args, models, image_shape):
    """Adds its `images`, uint8 `[N, C, H, W]`, and the `seconds` per image of each batch to each model. Returns the labels `[N]`.

    Image i draws its noise and then its label from random stream number i of the seed, as in EDM. The first of `repeats` draws
    is images 0 to `num_samples` - 1, and the others follow. Without classes the labels are 0.
    """
    classes, total, labels = models[0]["net"].label_dim or 1, args.num_samples * args.repeats, []
    for start in range(0, total, args.batch_size):
        streams = [random_stream(args.seed, index) for index in range(start, min(start + args.batch_size, total))]
        noise = torch.stack([torch.randn(image_shape, generator=stream) for stream in streams])
        batch_labels = torch.stack([torch.randint(classes, (), generator=stream) for stream in streams])
        labels.append(batch_labels)
        for model in models:  # in turn, so that a change in the machine's speed affects all of them
            begin = perf_counter()
            with autocast(args, next(model["net"].parameters()).device):
                images = sample_in_batches(model["sampler"], model["net"], noise, batch_labels, args.batch_size)
            model["seconds"].append((perf_counter() - begin) / len(images))
            model["images"].append(images)
    for model in models:
        model["images"] = torch.cat(model["images"])
    return torch.cat(labels)


def print_table(rows):
    """Prints one line per figure, each value followed by its noise, and one column per row."""
    print(f"{'':24}" + "".join(f"{row['name']:>24}" for row in rows))
    for name in [name for name in rows[-1] if name not in ("name", "checkpoint", "step", "noise", "fid_draws")]:
        cells = []
        for row in rows:
            value = row.get(name, "")
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            cells.append(f"{text} +- {row['noise'][name]:.1g}" if name in row["noise"] else text)
        print(f"{name:24}" + "".join(f"{cell:>24}" for cell in cells))


if __name__ == "__main__":
    exit_on_error(main, args)
