"""evaluate.py as a user runs it."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_NET, run_script, succeed, write_images, write_zip
from PIL import Image
from test_config import assert_refused

import evaluate
from data import load_dataset
from support import features, image_files
from support.config import EVALUATE, parse_args
from support.metrics import BETTER, best, frechet_distance, statistics, verdict
from support.plots import training_minutes

CLASSES = [str(i) for i in range(10)]


def classes_of(folder, each=10):
    write_images(folder / "set", classes=CLASSES, each=each, size=8)
    return ["--dataset", "folder", "--data_dir", folder / "set", "--output_dir", folder / "out", "--steps", 2]


def result(folder):
    return json.loads((folder / "out" / "evaluation.json").read_text())


def test_a_folder_beside_its_teacher(runs, tmp_path):
    """Every checkpoint of the run: figures with their noise on equal numbers of images, the verdict, the best one, the pictures."""
    data = [*classes_of(tmp_path), "--features", "classifier", "--num_samples", 45]
    teacher = runs / "teacher" / "teacher_final.pt"
    text = succeed("evaluate.py", "--checkpoint", runs / "dmd2", "--teacher_checkpoint", teacher, *data)
    found = result(tmp_path)
    real, taught, *students = found["rows"]
    assert [row["name"] for row in found["rows"]] == ["real, held out", "teacher, step 4", "dmd2, step 2", "dmd2, step 4"]
    assert [row.get("evaluations") for row in found["rows"]] == [None, 3, 1, 1]
    assert found["images_per_figure"] == 20 and [row["images"] for row in found["rows"]] == [20, 40, 40, 40]  # a fifth is held out
    for row in found["rows"]:
        assert BETTER.keys() <= row.keys() and row["noise"].keys() == BETTER.keys()
        assert all(f"{row[name]:.4g} +- " in text for name in BETTER)
    assert real["own_label"] > 2 * taught["own_label"] or real["frechet_distance"] < taught["frechet_distance"]
    minutes = [row["minutes"] for row in students]
    assert "minutes" not in real and 0 < minutes[0] < minutes[1]
    chosen = students[best(students)]
    assert found["best"] == chosen["checkpoint"] and f"recall and coverage: {found['best']}" in text
    told = found["verdict"]
    assert sorted(told["better"] + told["worse"] + told["as good"]) == sorted(BETTER)
    assert told == verdict(chosen, taught, real)
    training, held_out = features.split(load_dataset("folder", tmp_path / "set", 8, 1, "cpu"))
    small = [statistics(features.pixels(part.images)[1]) for part in (held_out, training)]
    assert real["pixel_frechet_distance"] == pytest.approx(frechet_distance(*small), rel=1e-4)
    assert "worse than its teacher in" in text and "as good as its teacher in" in text
    pictures = {"evaluation.png", "comparison.png", "diversity.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"evaluation.json", *pictures}
    shown = Image.open(tmp_path / "out" / "diversity.png")
    assert shown.size == (8 * (3 * 8 * 10 + 2 * 8), 8 * 8 * 10)  # 8x8 images of one class from each of three
    assert (tmp_path / "set_judge_8x1.pt").exists()

    done = run_script("evaluate.py", "--checkpoint", teacher, "--teacher_checkpoint", students[0]["checkpoint"], *data)
    assert_refused(done, "a generator")
    succeed("evaluate.py", "--checkpoint", runs / "dmd2" / "dmd2_final.pt", "--plot", "--output_dir", tmp_path / "out")
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000
    assert_refused(run_script("evaluate.py", "--checkpoint", tmp_path, *data), "no checkpoints in this folder")
    done = run_script("evaluate.py", "--checkpoint", teacher, "--dataset", "folder", cwd=tmp_path)  # where no ./data is
    assert_refused(done, "data: neither a folder nor a ZIP")


def test_a_run_that_has_not_logged_yet(runs, tmp_path):
    """Its metrics.jsonl is empty."""
    succeed("train_teacher.py", *TINY, *TINY_NET, "--output_dir", tmp_path / "run", "--step_number", 1, "--log_every", 2)
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    options = [*classes_of(tmp_path, each=2), "--num_samples", 4, "--steps", 1, "--features", "classifier"]
    text = succeed("evaluate.py", "--checkpoint", tmp_path / "run" / "teacher_final.pt", *options)
    assert "\nrecall" in text and "\nminutes" not in text


def test_minutes_of_training_add_up_line_by_line():
    """600 images at 10 per second are a minute, 600 more at 5 two more. A checkpoint between two lines counts up to the first."""
    rows = [{"step": 6, "images_per_second": 10.0}, {"step": 12, "images_per_second": 5.0}]
    assert [training_minutes(rows, 100, step) for step in (3, 6, 10, 12)] == [0.0, 1.0, 1.0, 3.0]


@pytest.mark.parametrize("features", ["pixels", "inception", "classifier"])
def test_without_classes(unconditional, tmp_path, inception_weights, features):
    """Without labels, figures of labels are left out. A classifier gives features, and a judge is trained, only with classes."""
    student, teacher = unconditional / "dmd2" / "dmd2_final.pt", unconditional / "teacher" / "teacher_final.pt"
    options = ["--checkpoint", student, "--teacher_checkpoint", teacher, "--output_dir", tmp_path / "out", "--num_samples", 20]
    options += ["--features", features, "--steps", 2]
    if features == "inception":
        options += ["--inception_weights", inception_weights]
    if features == "classifier":
        assert_refused(run_script("evaluate.py", *options), "set.zip has no classes to train one on; use --features inception")
        assert not (tmp_path / "out").exists()
        options += [*classes_of(tmp_path, each=5)]
    text = succeed("evaluate.py", *options)
    found = result(tmp_path)
    names = BETTER.keys() - {"own_label", "within_class_spread"}
    assert all(row["noise"].keys() == names and names <= row.keys() for row in found["rows"]) and len(found["rows"]) == 3
    assert not any(name in text for name in ("own_label", "within_class_spread", "class "))
    told = found["verdict"]
    assert sorted(told["better"] + told["worse"] + told["as good"]) == sorted(names)
    assert ("judge: " in text) == (features == "classifier") == (found["judge_accuracy"] is not None)
    same = [row["frechet_distance"] == row["pixel_frechet_distance"] for row in found["rows"]]
    assert all(same) if features == "pixels" else not any(same)
    shown = Image.open(tmp_path / "out" / "comparison.png")
    assert shown.size == (8 * 2 * 10, 8 * 20 * 10)  # ten rows of two images of the teacher's, each over the student's
    assert not list(unconditional.glob("*judge*"))


def test_with_classes_on_data_without_is_refused(runs, unconditional, tmp_path):
    data = ["--dataset", "folder", "--data_dir", unconditional / "set.zip", "--output_dir", tmp_path / "out"]
    done = run_script("evaluate.py", "--checkpoint", runs / "dmd2" / "dmd2_final.pt", *data)
    assert_refused(done, "--dataset folder has no classes; ")
    write_images(tmp_path / "few", classes=("a",), each=19, size=8)
    data = ["--dataset", "folder", "--data_dir", tmp_path / "few" / "a", "--output_dir", tmp_path / "out", "--features", "pixels"]
    done = run_script("evaluate.py", "--checkpoint", unconditional / "dmd2" / "dmd2_final.pt", *data)
    assert_refused(done, "only 19 images: too few")


def test_of_many_real_images_some_are_looked_at(unconditional, tmp_path, monkeypatch, capsys):
    """A large set is memory-mapped: a subset of the right size is used, the same at each call."""
    path = write_zip(tmp_path / "many.zip", labels=range(60), size=8, listed={})
    monkeypatch.setattr(image_files, "LARGE", 0)
    monkeypatch.setattr(evaluate, "MOST_REAL", 50)
    student = unconditional / "dmd2" / "dmd2_final.pt"
    flags = ["--checkpoint", student, "--dataset", "folder", "--data_dir", path, "--features", "pixels", "--num_samples", 20]
    for name in ("a", "b"):
        evaluate.main(parse_args(EVALUATE, "", [*map(str, flags), "--device", "cpu", "--output_dir", str(tmp_path / name)]))
        assert "real images: 50 of 60, a fixed random subset" in capsys.readouterr().out
    rows = [json.loads((tmp_path / name / "evaluation.json").read_text())["rows"][0] for name in ("a", "b")]
    assert rows[0] == rows[1] and rows[0]["images"] == 10


def test_fid_of_several_draws_against_published_statistics(runs, tmp_path, inception_weights):
    """EDM's protocol: each draw is compared with mu and sigma, and the least counts; the score; both kinds of features."""
    random = np.random.default_rng(0)
    mu, root = random.normal(size=2048), random.normal(size=(2048, 20)) / 20
    np.savez(tmp_path / "published.npz", mu=mu, sigma=root @ root.T)
    options = [*classes_of(tmp_path, each=5), "--inception_weights", inception_weights, "--num_samples", 12, "--repeats", 3]
    options += ["--inception_score", "--fid_reference", tmp_path / "published.npz"]
    text = succeed("evaluate.py", "--checkpoint", runs / "dmd2" / "dmd2_final.pt", *options)
    row = result(tmp_path)["rows"][-1]
    assert len(row["fid_draws"]) == 3 == len(set(row["fid_draws"])) and row["fid"] == min(row["fid_draws"])
    assert row["inception_score"] >= 1 and row["images"] == 30 and "own_label" in text  # three parts of the ten held out
    # mu is far from any feature of random weights: most of the distance is |m1 - m2|^2, less than half of it is the covariances
    assert np.square(mu).sum() / 2 < row["fid"] < 3 * np.square(mu).sum()


def test_fid_without_published_statistics_is_against_all_real_images(runs, tmp_path, inception_weights):
    options = [*classes_of(tmp_path, each=2), "--inception_weights", inception_weights, "--num_samples", 6]
    succeed("evaluate.py", "--checkpoint", runs / "dmd2" / "dmd2_final.pt", *options)
    row = result(tmp_path)["rows"][-1]
    assert row["fid_draws"] == [row["fid"]] and row["fid"] > 0


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file"),
        (b"text", "needs an .npz file"),
        ({"mu": np.zeros(3)}, "needs an .npz file"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, "do not match"),
        ({"mu": np.zeros(3), "sigma": np.zeros((3, 3))}, "3 features; Inception has 2048"),
        ({"mu": np.array([{}]), "sigma": np.zeros((1, 1))}, "needs an .npz file"),
    ],
)
def test_unfit_statistics_are_refused(runs, tmp_path, content, message):
    path = tmp_path / "statistics.npz"
    if isinstance(content, dict):
        np.savez(path, **content)
    elif content:
        path.write_bytes(content)
    done = run_script("evaluate.py", "--checkpoint", runs / "dmd2" / "dmd2_final.pt", "--fid_reference", path, cwd=tmp_path)
    assert_refused(done, message)
    assert str(path) in done.stderr


def test_an_image_depends_on_its_number_alone(runs, tmp_path):
    """Images depend neither on the batch nor on their number: the second of three draws of 4 is images 4 to 7 of a draw of 12."""
    drawn = []
    for samples, repeats, batch_size in ((12, 1, 5), (4, 3, 12)):
        flags = ["--num_samples", samples, "--repeats", repeats, "--batch_size", batch_size, "--device", "cpu"]
        args = parse_args(EVALUATE, "", ["--checkpoint", str(runs / "dmd2" / "dmd2_final.pt"), *map(str, flags)])
        models = evaluate.load_models(args, runs / "dmd2" / "dmd2_final.pt", torch.device("cpu"))
        drawn.append((evaluate.generate(args, models, (1, 8, 8)), models[0]["images"]))
        assert models[0]["sampler"](models[0]["net"], torch.zeros(1, 1, 8, 8), torch.tensor([0])).dtype == torch.uint8
    assert torch.equal(drawn[0][0], drawn[1][0]) and len(drawn[0][0].unique()) > 3
    assert (drawn[0][1].int() - drawn[1][1].int()).abs().max() <= 1

    model = models[0] | {"images": [], "sampler": lambda net, noise, labels: labels.reshape(-1, 1, 1, 1).expand(noise.shape)}
    labels = evaluate.generate(args, [model], (1, 8, 8))
    assert torch.equal(model["images"][:, 0, 0, 0], labels)


def test_fid_reference_is_what_it_says(tmp_path):
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).double()
    mean, covariance = statistics(features)
    np.savez(tmp_path / "a.npz", mu=mean.numpy(), sigma=covariance.numpy())
    assert frechet_distance(statistics(features), evaluate.read_fid_reference(tmp_path / "a.npz", 4)) == pytest.approx(0, abs=1e-6)
