"""evaluate.py: metrics on equal numbers of images, what it refuses, and the FID's protocol."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import flags, refuses, succeed, write_images, write_zip
from PIL import Image

import checkpoint
import evaluate
import generate
from data import load_dataset
from evaluation import features
from evaluation.metrics import BETTER, best, frechet_distance, statistics, verdict, with_root
from evaluation.plots import training_minutes
from support.options import parse_args
from support.script import UserError

CLASSES = [str(i) for i in range(10)]


def classes_of(folder, each=10):
    write_images(folder / "set", classes=CLASSES, each=each, size=8)
    return ["--dataset", "folder", "--data_dir", folder / "set", "--output_dir", folder / "out", "--steps", 2]


def result(folder):
    return json.loads((folder / "out" / "evaluation.json").read_text())


def evaluated(*options):
    evaluate.main([*map(str, options), "--device", "cpu"])


def told(verdict):
    return sorted(verdict["better"] + verdict["worse"] + verdict["as good"])


def test_a_folder_beside_its_teacher(runs, tmp_path):
    """Each checkpoint of the run: metrics and noise on equal numbers of images, the verdict, the best, pictures."""
    data = [*classes_of(tmp_path), "--features", "classifier", "--num_samples", 45]
    command = ["--checkpoint", runs / "dmd2", "--teacher_checkpoint", runs / "teacher" / "teacher_final.pt", *data]
    command += ["--guide_checkpoint", runs / "teacher" / "teacher_checkpoint_step_2.pt"]  # of the teacher alone
    # Jupyter's, in an environment without Jupyter's packages.
    text = succeed("evaluate.py", *command, env={"MPLBACKEND": "module://matplotlib_inline.backend_inline"})
    found = result(tmp_path)
    real, taught, *students = found["rows"]
    names = ["real, held out", "teacher, step 4, guided by 1.5", "dmd2, step 2", "dmd2, step 4"]
    assert [row["name"] for row in found["rows"]] == names
    assert [row.get("evaluations") for row in found["rows"]] == [None, 6, 1, 1]
    assert found["images_per_metric"] == 20  # a fifth is held out
    assert [row["images"] for row in found["rows"]] == [20, 40, 40, 40]
    for row in found["rows"]:
        assert BETTER.keys() <= row.keys() and row["noise"].keys() == BETTER.keys()
        assert all(f"{row[name]:.4g} +- " in text for name in BETTER)
    assert real["own_label"] > 2 * taught["own_label"] or real["frechet_distance"] < taught["frechet_distance"]
    minutes = [row["minutes"] for row in students]
    assert "minutes" not in real and 0 < minutes[0] < minutes[1]
    chosen = students[best(students)]
    assert found["best"] == chosen["checkpoint"] and f"recall and coverage: {found['best']}" in text
    assert told(found["verdict"]) == sorted(BETTER) and found["verdict"] == verdict(chosen, taught, real)
    assert "\n  worse in" in text and "\n  as good in" in text
    training, held_out = features.split(load_dataset("folder", tmp_path / "set", 8, 1, "cpu"))
    small = [features.averaged_pixels(part.images) for part in (held_out, training)]
    distance = frechet_distance(small[0], with_root(*statistics(small[1])))
    assert real["pixel_frechet_distance"] == pytest.approx(distance, rel=1e-4)
    pictures = {"evaluation.png", "comparison.png", "diversity.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"evaluation.json", *pictures}
    shown = Image.open(tmp_path / "out" / "diversity.png")
    assert shown.size == (8 * (3 * 90 + 8), 8 * 98)  # 8x8 images of one class from each of three
    assert (tmp_path / "set_classifier_8x1.pt").exists()
    evaluated("--checkpoint", runs / "dmd2" / "dmd2_final.pt", "--plot", "--output_dir", tmp_path / "out")
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000


MISTAKES = [
    ("student.pt", ["--teacher_checkpoint", "student.pt"], "a generator"),
    (".", [], "no checkpoints in this folder"),
    (".", ["--plot"], "metrics.jsonl: missing, or holds no"),
    ("student.pt", ["--dataset", "folder", "--data_dir", "data"], "data: not a readable folder or ZIP"),
    ("student.pt", ["--dataset", "folder", "--data_dir", "set.zip"], "student.pt: knows 10 classes"),
    ("cars.pt", ["--dataset", "mnist5k"], "automobile"),
    ("theirs.pt", [], "theirs, which is not here: give --data_dir"),  # and it is not made
    ("unconditional.pt", ["--dataset", "folder", "--data_dir", "few", "--features", "pixels"], "only 19 images: too"),
    ("unconditional.pt", ["--data_dir", "set.zip", "--features", "classifier"], "set.zip has no classes to train one"),
]


@pytest.mark.parametrize("file, options, message", MISTAKES, ids=[message for *_, message in MISTAKES])
def test_mistakes_are_refused(runs, unconditional, tmp_path, monkeypatch, file, options, message):
    monkeypatch.chdir(tmp_path)
    for stage, name in ((runs, "student"), (unconditional, "unconditional")):
        os.symlink(stage / "dmd2" / "dmd2_final.pt", f"{name}.pt")
    os.symlink(unconditional / "set.zip", "set.zip")
    write_images(tmp_path, classes=("few",), each=19, size=8)
    state = checkpoint.load("student.pt") | {"class_names": ["automobile", *CLASSES[1:]]}
    for name, changes in (("cars", {"dataset": "cifar10"}), ("theirs", {"data_dir": "theirs"})):
        checkpoint.save(f"{name}.pt", state | {"config": state["config"] | changes})
    refuses(message, "evaluate.py", "--checkpoint", file, "--output_dir", "out", "--device", "cpu", *options)
    assert not os.path.exists("theirs") and not os.path.exists("out/evaluation.json")


def test_results_outlive_a_report_that_fails(runs, tmp_path, monkeypatch):
    """They are written before they are told. This run's metrics.jsonl is damaged, and has a step without speed."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "teacher_final.pt").symlink_to(runs / "teacher" / "teacher_final.pt")
    lines = ['{"step": 2, "images_per_second": 0.0}', "\0\0", '{"step": 4, "images_per_second": 32.0}']
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(evaluate, "print_table", lambda rows: "\u00e9".encode("ascii"))  # as on an ASCII terminal
    options = ["--checkpoint", folder, *classes_of(tmp_path, each=2), "--num_samples", 4, "--features", "classifier"]
    with pytest.raises(UnicodeEncodeError):
        evaluated(*options)
    assert result(tmp_path)["rows"][-1]["minutes"] == pytest.approx(4 * 16 / 32 / 60)


def test_minutes_of_training_add_up_line_by_line():
    """600 images at 10 per second are a minute, 600 more at 5 two. Between two lines a step counts its share."""
    rows = [{"step": step, "images_per_second": speed} for step, speed in ((6, 10.0), (9, 0.0), (10, None), (12, 5.0))]
    assert [training_minutes(rows, 100, step) for step in (3, 6, 11, 12)] == pytest.approx([0.5, 1.0, 1.0 + 5 / 3, 3.0])


def test_results_are_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    assert evaluate.read_results(path) is None
    evaluate.write_results(path, {"rows": [1]})
    monkeypatch.setattr(os, "fsync", lambda file: os.write(-1, b""))  # a full disk
    with pytest.raises(UserError, match=r"results\.json: .* is intact"):
        evaluate.write_results(path, {"rows": [2]})
    assert evaluate.read_results(path) == {"rows": [1]} and list(tmp_path.iterdir()) == [path]
    for damaged in (path.read_bytes()[:8], b"\xff"):
        path.write_bytes(damaged)
        assert evaluate.read_results(path) is None


@pytest.mark.parametrize("features", ["pixels", "inception", "classifier"])
def test_without_classes(unconditional, tmp_path, capsys, inception_weights, features):
    """Without labels, metrics of labels are left out. A classifier is trained only for its features."""
    student, teacher = unconditional / "dmd2" / "dmd2_final.pt", unconditional / "teacher" / "teacher_final.pt"
    options = ["--checkpoint", student, "--teacher_checkpoint", teacher, "--output_dir", tmp_path / "out"]
    options += ["--num_samples", 20, "--features", features, "--steps", 2, "--inception_weights", inception_weights]
    classified = features == "classifier"
    evaluated(*options, *(classes_of(tmp_path, each=5) if classified else []))
    text, found = capsys.readouterr().out, result(tmp_path)
    names = BETTER.keys() - {"own_label", "within_class_spread"}
    assert len(found["rows"]) == 3 and all(row["noise"].keys() == names <= row.keys() for row in found["rows"])
    assert not any(name in text for name in ("own_label", "within_class_spread", "class "))
    assert told(found["verdict"]) == sorted(names)
    assert ("a classifier, trained" in text) == classified == (found["classifier_accuracy"] is not None)
    same = [row["frechet_distance"] == row["pixel_frechet_distance"] for row in found["rows"]]
    assert all(same) if features == "pixels" else not any(same)
    shown = Image.open(tmp_path / "out" / "comparison.png")
    assert shown.size == (8 * 22, 8 * 202)  # ten rows of two images of the teacher's, each over the student's
    assert not list(unconditional.glob("*classifier*"))


def test_each_average_of_a_generator(runs, tmp_path, capsys):
    """A row for each. generate.py samples the one that is asked for."""
    state, file = checkpoint.load(runs / "dmd2" / "dmd2_final.pt"), tmp_path / "averages.pt"
    further = {name: tensor.neg() for name, tensor in state["ema_state_dict"].items()}
    checkpoint.save(file, state | {"ema_0.9_state_dict": further})
    evaluated("--checkpoint", file, "--features", "pixels", *classes_of(tmp_path, each=5), "--num_samples", 20)
    _, first, second = result(tmp_path)["rows"]
    assert (first["name"], second["name"]) == ("dmd2, step 4", "dmd2, step 4, average 0.9")
    assert first["pixel_frechet_distance"] != second["pixel_frechet_distance"]
    options = flags(checkpoint=file, num_samples=2, format="npz", device="cpu")
    generate.main([*options, *flags(ema_decay=0.9, output_dir=tmp_path / "further")])
    checkpoint.save(file, state | {"ema_state_dict": further})
    generate.main([*options, *flags(output_dir=tmp_path / "first")])
    ours, theirs = (np.load(tmp_path / name / "samples.npz")["images"] for name in ("further", "first"))
    assert (ours == theirs).all()
    refuses(f"--ema_decay 0.9: beside its first average, {file} has none", "generate.py", *options, ema_decay=0.9)


def test_of_many_real_images_some_are_looked_at(unconditional, tmp_path, monkeypatch, capsys):
    """Of a large set a subset of the right size is used, the same at each call."""
    data = write_zip(tmp_path / "many.zip", labels=range(60), size=8, listed={})
    monkeypatch.setattr(evaluate, "MOST_REAL", 50)
    options = ["--checkpoint", unconditional / "dmd2" / "dmd2_final.pt", "--dataset", "folder", "--data_dir", data]
    rows = []
    for _ in range(2):
        evaluated(*options, "--features", "pixels", "--num_samples", 20, "--output_dir", tmp_path / "out")
        assert "real images: 50 of 60, a fixed random subset" in capsys.readouterr().out
        rows.append(result(tmp_path)["rows"][0])
    assert rows[0] == rows[1] and rows[0]["images"] == 10


@pytest.mark.parametrize("published", [True, False])
def test_fid(runs, tmp_path, inception_weights, published, monkeypatch):
    """EDM's protocol: generated images are compared with all real ones. Each image is looked at once."""
    seen, see = [], features.inception(str(inception_weights), torch.device("cpu"))
    monkeypatch.setattr(features, "inception", lambda *arguments: lambda images: seen.append(images) or see(images))
    options = [*classes_of(tmp_path, each=3), "--num_samples", 10]
    if published:
        random = np.random.default_rng(0)
        mu, root = random.normal(size=2048), random.normal(size=(2048, 20)) / 20
        np.savez(tmp_path / "published.npz", mu=mu, sigma=root @ root.T)
        options += ["--fid_reference", tmp_path / "published.npz"]
    evaluated("--checkpoint", runs / "dmd2" / "dmd2_final.pt", *options)
    row = result(tmp_path)["rows"][-1]
    assert [len(images) for images in seen] == [24, 6, 10]  # real, held out, generated
    real = map(torch.from_numpy, (mu, root @ root.T)) if published else statistics(see(torch.cat(seen[:2])))
    assert row["fid"] == pytest.approx(frechet_distance(see(seen[2]), with_root(*real)), rel=1e-6)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file"),
        (b"text", "needs an .npz file"),
        ({"mu": np.zeros(2048)}, "needs an .npz file"),
        ({"mu": np.zeros(2048), "sigma": np.zeros((2, 2))}, r"these are \[2048\] and \[2, 2\]"),
        ({"mu": np.array([{}]), "sigma": np.zeros((1, 1))}, "Object arrays cannot be loaded"),
    ],
)
def test_unfit_statistics_are_refused(tmp_path, content, message):
    path = tmp_path / "statistics.npz"
    if isinstance(content, dict):
        np.savez(path, **content)
    elif content:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"--fid_reference {path}: .*{message}"):
        evaluate.read_fid_reference(path)


def test_an_image_depends_on_its_number_alone(runs):
    """Neither on the batch nor on how many there are. It is of the class that is its label."""
    drawn, cpu = [], torch.device("cpu")
    for samples, batch_size in ((12, 5), (8, 12)):
        size = flags(num_samples=samples, batch_size=batch_size, device="cpu")
        args = parse_args(evaluate.OPTIONS, "", [*size, "--checkpoint", str(runs / "dmd2" / "dmd2_final.pt")])
        (model,) = evaluate.load_models(args, cpu)
        labels = evaluate.generate(args, [model], (1, 8, 8), cpu)
        drawn.append((labels, model.images))
        assert model.images.dtype == torch.uint8 and model.seconds > 0
    assert torch.equal(drawn[0][0][:8], labels) and len(labels.unique()) > 3
    assert (drawn[0][1][:8].int() - model.images.int()).abs().max() <= 1

    model.sampler = lambda noise, labels: labels.reshape(-1, 1, 1, 1).expand(noise.shape) / 10
    assert torch.equal(evaluate.generate(args, [model], (1, 8, 8), cpu), labels)
    assert torch.equal(model.images[:, 0, 0, 0], (labels / 10 * 127.5 + 127.5).round().to(torch.uint8))
