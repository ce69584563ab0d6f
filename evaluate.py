"""Compare a generator with its teacher and real images in quality, diversity and speed; or plot a run's curves."""

import json
from pathlib import Path
from statistics import median
from time import perf_counter
from types import SimpleNamespace

import numpy as np
import torch

import checkpoint
from data import DATA, READERS, check_classes, load_dataset, subset
from evaluation import features, metrics
from evaluation.plots import plot_metrics, plot_quality, save_comparison, save_diversity, training_minutes
from generate import SAMPLING, choose_sampler
from run import read_metrics
from sampling import random_stream
from support.device import MACHINE, autocast, choose_device
from support.images import to_uint8
from support.options import Option, choice, flag, number, parse_args, path
from support.script import UserError, as_user_error, make_folder, run_script

FEATURES = choice("inception", "classifier", "pixels")
OPTIONS = {
    "what to evaluate": [
        Option("checkpoint", "./log/checkpoints/dmd2/dmd2_final.pt", path, "generator, teacher, or a run's folder"),
        Option("teacher_checkpoint", None, path, "teacher to compare with"),
        Option("output_dir", None, path, "where the results go; default: the checkpoint's folder"),
        Option("plot", False, flag, "only draw the run's curves from metrics.jsonl, as curves.png"),
    ],
    "real images": [
        Option("dataset", None, choice(*READERS), "data set of real images; default: that of the training"),
        Option("data_dir", None, path, "where it is; default: as in the training"),
        Option("fid_reference", None, path, "file of statistics (mu, sigma) for the FID; default: the data set's"),
    ],
    "metrics": [
        Option("num_samples", 50_000, number(4, whole=True), "images to generate, of random classes"),
        Option("features", "inception", FEATURES, "inception (for the FID too), classifier (of the data) or pixels"),
        Option("inception_weights", None, path, "file of torch-fidelity's Inception weights; default: download"),
    ],
    "sampling": SAMPLING,
    "machine": MACHINE,
}
MOST_REAL = 100_000  # most real images used: more would change little and take much memory


def main(argv=None):
    """Evaluates with the options in `argv`, by default those of the command line."""
    args = parse_args(OPTIONS, __doc__, argv)
    file = Path(args.checkpoint)
    folder = file if file.is_dir() else file.parent
    output_dir = Path(args.output_dir or folder)
    if args.plot:
        make_folder("--output_dir", output_dir)
        plot_metrics(folder / "metrics.jsonl", output_dir / "curves.png")
        print(f"wrote {output_dir / 'curves.png'}")
        return
    if args.fid_reference and args.features != "inception":
        raise UserError(f"--fid_reference needs --features inception, not {args.features}")

    # ---- setup ------------------------------------------------------------------------------------------------------
    device = choose_device(args)
    models = load_models(args, device)
    fid_reference = args.fid_reference and read_fid_reference(args.fid_reference)
    dataset = load_real_images(args, models, device)
    make_folder("--output_dir", output_dir)
    conditional = models[0].net.label_dim > 0
    inception = features.inception(args.inception_weights, device) if args.features == "inception" else None
    classifier = accuracy = None
    if conditional or args.features == "classifier":
        config = models[0].net.config
        place = Path(args.data_dir).resolve() if args.dataset == "folder" else Path(args.data_dir, args.dataset)
        cache = place.with_name(f"{place.stem}_classifier_{config['img_resolution']}x{config['img_channels']}.pt")
        classifier, accuracy = features.classifier(dataset, cache, device)
        print(f"a classifier, trained on four fifths of the real images: accuracy {accuracy:.4f} on the held-out fifth")

    def see(images):
        """What `metrics.measure` needs of `images`, all but themselves."""
        seen = dict.fromkeys(("features", "neighbours", "small"), features.averaged_pixels(images).to(device))
        if classifier:
            classified, logits = classifier(images)
            seen |= {"logits": logits} if conditional else {}
            seen |= {"features": classified} if args.features == "classifier" else {}
        if inception:
            seen["features"] = seen["neighbours"] = inception(images)
        return seen

    def measured(seen, images, labels):
        return metrics.measure_with_noise(seen | {"images": images.to(device)}, labels.to(device), reference, size)

    # ---- real images ------------------------------------------------------------------------------------------------
    training, held_out = features.split(dataset)
    if not conditional:
        held_out.labels.zero_()  # like the labels of the models' images
    size = min(args.num_samples, len(held_out.labels))  # as many real as generated images for every metric
    real, seen = see(training.images), see(held_out.images)
    reference = metrics.reference(real, seen)
    if inception:
        mean_and_covariance = fid_reference or metrics.statistics(torch.cat([real["features"], seen["features"]]))
        fid_reference = metrics.with_root(*[part.to(device) for part in mean_and_covariance])
    rows = [{"name": "real, held out"} | measured(seen, held_out.images, held_out.labels)]
    sets, class_names = [held_out.images.cpu()], dataset.class_names
    del dataset, training, real, seen  # large

    # ---- the models -------------------------------------------------------------------------------------------------
    labels = generate(args, models, sets[0].shape[1:], device)
    for model in models:
        row, seen = model.row, see(model.images)
        log, config = read_metrics(Path(model.file).with_name("metrics.jsonl")), model.facts["config"]
        if log and config.get("batch_size"):
            row["minutes"] = training_minutes(log, config["batch_size"], row["step"])
        row |= measured(seen, model.images, labels)
        if inception:
            row["fid"] = metrics.frechet_distance(seen["features"], fid_reference)
        row["images_per_second"] = 1 / model.seconds
        rows.append(row)
        sets.append(model.images)

    # ---- report: results are written before anything else can fail --------------------------------------------------
    first = 2 if args.teacher_checkpoint else 1  # row of the first checkpoint, after real images and teacher
    chosen = first + metrics.best(rows[first:])
    result = {"features": args.features, "num_samples": args.num_samples, "classifier_accuracy": accuracy}
    result |= {"images_per_metric": size, "device": str(device), "rows": rows, "best": rows[chosen]["checkpoint"]}
    if args.teacher_checkpoint:
        result["verdict"] = metrics.verdict(rows[chosen], rows[1], rows[0])
        result["speed_ratio"] = rows[chosen]["images_per_second"] / rows[1]["images_per_second"]
    write_results(output_dir / "evaluation.json", result)
    print_table(rows)
    if file.is_dir() and len(rows) - first > 1:
        plot_quality(output_dir / "evaluation.png", {"checkpoints": [rows[first:]]})
        print(f"best by the mean rank in both Frechet distances, recall and coverage: {result['best']}")
    if args.teacher_checkpoint:
        print(f"{rows[chosen]['name']} against its teacher, at {result['speed_ratio']:.1f} times its speed:")
        for how, names in result["verdict"].items():
            print(f"  {how} in {', '.join(names) or 'nothing'}")
        rows_of = labels if conditional else torch.arange(len(labels)) % 10
        save_comparison(output_dir / "comparison.png", sets[1], sets[chosen], rows_of)
    shown = [*range(first), chosen]
    labels_of = [held_out.labels.cpu(), *[labels] * first]
    label = save_diversity(output_dir / "diversity.png", [sets[i] for i in shown], labels_of)
    what = f"class {class_names[label]}, " if conditional else ""
    print(f"diversity.png: {what}{', '.join(rows[i]['name'] for i in shown)} from left to right")
    print(f"wrote {output_dir / 'evaluation.json'} and pictures beside it")


def load_models(args, device):
    """A namespace per network. Raises UserError if they make images of different shapes or classes."""
    place, teacher, models = Path(args.checkpoint), args.teacher_checkpoint, []
    found = checkpoint.all_checkpoints(place, "dmd2") or checkpoint.all_checkpoints(place, "teacher")
    files = list(dict(found).values()) if place.is_dir() else [place]
    if not files:
        raise UserError(f"--checkpoint {place}: no checkpoints in this folder")
    for file in [teacher, *files] if teacher else files:
        state = checkpoint.load_teacher(file) if file is teacher else checkpoint.load(file)
        name = f"{checkpoint.kind(state)}, step {state['step']}"
        if args.guide_checkpoint and checkpoint.kind(state) == "teacher":
            name += f", guided by {args.guidance_scale:g}"
        facts = {fact: state.get(fact) for fact in ("config", "model_config", "class_names")}
        further = checkpoint.averages(state) if file is place else {}
        states = {"": state} | {f", average {decay}": average for decay, average in further.items()}
        for suffix, one in states.items():
            net = checkpoint.network(one, file, device)
            sampler, evaluations = choose_sampler(args, one, net, device)
            row = {"name": name + suffix, "checkpoint": str(file), "step": state["step"], "evaluations": evaluations}
            models.append(SimpleNamespace(file=file, net=net, sampler=sampler, facts=facts, row=row))
            checkpoint.check_same_images(file, net.config, models[0].net.config, f"that of {models[0].file}")
    return models


def load_real_images(args, models, device):
    """The data set of real images, at most MOST_REAL of them. Raises UserError if it does not fit the models."""
    file, config, shape = models[-1].file, models[-1].facts["config"], models[0].net.config
    args.dataset, args.data_dir = args.dataset or config.get("dataset"), args.data_dir or config.get("data_dir")
    if args.dataset not in [*READERS] or not isinstance(args.data_dir, str):
        raise UserError(f"{file} does not say what real images to compare with: give --dataset and --data_dir")
    known = "data_dir" in args.given or args.data_dir == DATA[1].default or Path(args.data_dir).exists()
    if not known:  # a checkpoint does not choose where data are put
        raise UserError(f"{file} was trained on data in {args.data_dir}, which is not here: give --data_dir")
    dataset = load_dataset(args.dataset, args.data_dir, shape["img_resolution"], shape["img_channels"], device)
    if args.features == "classifier" and len(dataset.class_names) < 2:
        raise UserError(f"--features classifier: {args.data_dir} has no classes to train one on; try another")
    for model in models:
        check_classes(f"checkpoint {model.file}", dataset, model.facts, args.dataset)
    if len(dataset.labels) > MOST_REAL:
        print(f"real images: {MOST_REAL} of {len(dataset.labels)}, a fixed random subset")
        order = torch.randperm(len(dataset.labels), generator=random_stream(0, 0))
        dataset = subset(dataset, order[:MOST_REAL].sort().values)
    return dataset


def read_fid_reference(path):
    """The published statistics of real images, (mu `[2048]`, sigma `[2048, 2048]`). Raises UserError if it has none."""
    needed = "needs an .npz file with mu [2048] and sigma [2048, 2048]"
    with as_user_error(f"--fid_reference {path}: {needed}", Exception):  # any file may be given
        with np.load(path, allow_pickle=False) as arrays:
            mean, covariance = (torch.from_numpy(arrays[name]).double() for name in ("mu", "sigma"))
        if mean.shape != (2048,) or covariance.shape != (2048, 2048):
            raise ValueError(f"these are {list(mean.shape)} and {list(covariance.shape)}")
    return mean, covariance


@torch.inference_mode()
def generate(args, models, image_shape, device):
    """Gives each model its `images`, uint8 `[N, C, H, W]`, and `seconds` per image. Returns the labels `[N]`.

    Image i draws its noise, then its label (0 without classes), from random stream i of the seed, as in EDM.
    """
    labels, label_dim = [], models[0].net.label_dim
    for model in models:
        model.images, model.seconds = [], []
    for numbers in torch.arange(args.num_samples).split(args.batch_size):
        streams = [random_stream(args.seed, index) for index in numbers.tolist()]
        noise = torch.stack([torch.randn(image_shape, generator=stream) for stream in streams])
        labels.append(torch.stack([torch.randint(label_dim or 1, (), generator=stream) for stream in streams]))
        for model in models:  # in turn, so that a change in the machine's speed affects all of them
            begin = perf_counter()
            with autocast(args, device):
                images = model.sampler(noise.to(device), labels[-1].to(device))
            model.images.append(to_uint8(images).cpu())
            model.seconds.append((perf_counter() - begin) / len(noise))
    for model in models:
        model.images, model.seconds = torch.cat(model.images), median(model.seconds)
    return torch.cat(labels)


def write_results(path, results):
    """Writes the dict `results` as JSON. Raises UserError as `checkpoint.write` does."""
    content = json.dumps(results, indent=2) + "\n"
    checkpoint.write(path, lambda file: file.write(content.encode()))


def read_results(path):
    """The dict that `write_results` wrote, or None if the file is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def print_table(rows):
    """Prints one line per metric, each value followed by its noise, and one column per row."""
    print(f"{'':24}" + "".join(f"{row['name']:>24}" for row in rows))
    for name in [name for name in rows[-1] if name not in ("name", "checkpoint", "step", "noise")]:
        cells = []
        for row in rows:
            value = row.get(name, "")
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            cells.append(f"{text} +- {row['noise'][name]:.1g}" if name in row["noise"] else text)
        print(f"{name:24}" + "".join(f"{cell:>24}" for cell in cells))


if __name__ == "__main__":
    run_script(main)
