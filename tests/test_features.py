import json
import re
from argparse import Namespace

import pytest
import torch
from conftest import ROOT, run_script, succeed, write_images
from test_config import assert_refused

from data import load_dataset
from support import features
from support.config import UserError
from support.images import to_uint8
from support.metrics import scores

CPU = torch.device("cpu")
CLASSIFIER = Namespace(features="classifier", inception_score=False, precision_recall=False)
INCEPTION = Namespace(features="inception", inception_score=True, precision_recall=True)


@pytest.mark.slow
def test_classifier_ranks_real_above_blurred_above_noise(tmp_path):
    """Real digits that it has not seen, the same moved half-way to their class mean, noise. And it reads digits."""
    dataset = load_dataset("mnist5k", tmp_path, 16)
    cache = tmp_path / "judge.pt"
    measure, accuracy = features.classifier(dataset, cache, CPU, steps=300)
    assert accuracy > 0.95
    again, same_accuracy = features.classifier(dataset, cache, CPU, steps=300)  # from the cache
    images = dataset.images[:50]
    assert same_accuracy == accuracy and torch.equal(again(images)[0], measure(images)[0])

    train_set, held_out = features.split(dataset)
    assert len(train_set.labels) == 4000 and len(held_out.labels) == 1000
    real = measure(train_set.images)[0]
    means = torch.stack([train_set.images[train_set.labels == label].float().mean(0) for label in range(10)])
    blurred = ((held_out.images.float() + means[held_out.labels]) / 2).to(torch.uint8)
    noise = to_uint8(torch.randn(1000, 1, 16, 16, generator=torch.Generator().manual_seed(0)))
    judged = [scores(measure(images), held_out.labels, real, CLASSIFIER) for images in (held_out.images, blurred, noise)]
    distances, shares = ([score[key] for score in judged] for key in ("frechet_distance", "own_label"))
    assert distances[0] < distances[1] < distances[2] and distances[2] > 10 * distances[0]
    assert shares[0] > 0.95 and shares[2] < 0.3


def test_cached_classifier_of_other_data_is_not_used(tmp_path):
    write_images(tmp_path / "a", size=16)
    write_images(tmp_path / "b", size=16, seed=1)
    for name in ("a", "b"):
        features.classifier(load_dataset("folder", tmp_path / name, 16), tmp_path / "judge.pt", CPU, steps=2)
        features.classifier(load_dataset("folder", tmp_path / name, 16), "/dev/null/judge.pt", CPU, steps=2)  # nowhere to keep it
        state = torch.load(tmp_path / "judge.pt", weights_only=True)
        if name == "a":
            first = state
    assert state["fingerprint"] != first["fingerprint"]
    (tmp_path / "judge.pt").write_bytes(b"ab")  # damaged: made again
    features.classifier(load_dataset("folder", tmp_path / "a", 16), tmp_path / "judge.pt", CPU, steps=2)
    assert torch.load(tmp_path / "judge.pt", weights_only=True)["fingerprint"] == first["fingerprint"]


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """torch-fidelity's Inception with random weights, as the file that it would download."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    patch = pytest.MonkeyPatch()
    patch.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
    patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    torch.manual_seed(0)
    network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    patch.undo()
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


def test_fid_of_identical_sets_is_zero_and_of_shifted_sets_is_not(inception_weights):
    measure = features.inception(str(inception_weights), CPU)
    images = torch.randint(0, 200, (24, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen, logits = measure(images)
    assert seen.shape == (24, 2048) and logits.shape == (24, 1008)
    same = scores((seen, logits), None, seen, INCEPTION)
    shifted = scores(measure(images + 50), None, seen, INCEPTION)
    assert abs(same["frechet_distance"]) < 1e-3 * shifted["frechet_distance"]
    assert same["precision"] == same["recall"] == 1.0 and same["inception_score"] >= 1.0
    part = scores((seen[:12], logits[:12]), None, seen, INCEPTION)  # every image is real, half of the real are missing
    assert part["precision"] == 1.0 and part["images"] == 12
    grey = measure(images[:2, :1])[0]  # one channel stands for all three
    torch.testing.assert_close(grey, measure(images[:2, :1].expand(-1, 3, -1, -1))[0])


def test_evaluate_with_inception(runs, tmp_path, inception_weights):
    file = runs / "dmd2" / "dmd2_final.pt"
    write_images(tmp_path / "set", classes=[str(i) for i in range(10)], each=2, size=8)
    data = ["--dataset", "folder", "--data_dir", tmp_path / "set", "--output_dir", tmp_path / "out", "--num_samples", 20]
    succeed("evaluate.py", "--checkpoint", file, *data, "--inception_weights", inception_weights, "--inception_score")
    (row,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())["rows"]
    assert row["frechet_distance"] > 0 and row["inception_score"] >= 1 and row["evaluations"] == 1
    (tmp_path / "no.pth").write_text("not weights")
    assert_refused(
        run_script("evaluate.py", "--checkpoint", file, *data, "--inception_weights", tmp_path / "no.pth"), "not torch-fidelity's"
    )


def test_failed_download_of_inception_says_what_to_do(monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3 as module

    def offline(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(module, "load_state_dict_from_url", offline)
    with pytest.raises(UserError, match=r"no network.*--inception_weights.*--features classifier"):
        features.inception(None, CPU)


def test_evaluate_a_folder_beside_its_teacher(runs, tmp_path):
    """Every checkpoint of the run, a curve, the best one, teacher and student from the same noise; and the run's curves."""
    write_images(tmp_path / "set", classes=[str(i) for i in range(10)], each=10, size=8)
    out = ["--output_dir", tmp_path / "out"]
    data = ["--dataset", "folder", "--data_dir", tmp_path / "set", "--features", "classifier", "--num_samples", 40, "--steps", 2]
    teacher = runs / "teacher" / "teacher_final.pt"
    text = succeed("evaluate.py", "--checkpoint", runs / "dmd2", "--teacher_checkpoint", teacher, *data, *out)
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["real, held out", "teacher, step 4", "dmd2, step 2", "dmd2, step 4"]
    assert [row.get("evaluations") for row in result["rows"]] == [None, 3, 1, 1]
    students = result["rows"][2:]
    best = min(students, key=lambda row: row["frechet_distance"])
    assert result["best"] == best["checkpoint"] and f"best: {best['checkpoint']}" in text
    ratio = best["frechet_distance"] / result["rows"][1]["frechet_distance"]
    assert result["quality_ratio"] == pytest.approx(ratio) and "own_label" in best
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"evaluation.json", "evaluation.png", "comparison.png"}
    assert (tmp_path / "set_judge_8x1.pt").exists()

    assert_refused(
        run_script("evaluate.py", "--checkpoint", teacher, "--teacher_checkpoint", students[0]["checkpoint"], *out), "a generator"
    )
    succeed("evaluate.py", "--checkpoint", runs / "dmd2" / "dmd2_final.pt", "--plot", *out)
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000
    assert_refused(run_script("evaluate.py", "--checkpoint", tmp_path, *out), "no checkpoints in this folder")
    done = run_script("evaluate.py", "--checkpoint", teacher, "--dataset", "folder", *out, cwd=tmp_path)  # where no ./data is
    assert_refused(done, "data: neither a folder nor a ZIP")


def test_shipped_pictures_are_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    named = set(re.findall(r"docs/[\w.-]+\.png", readme))
    assert named and named == {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.png")}
