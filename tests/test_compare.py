"""compare.py: equal work, the files that it writes, and no work done twice."""

import json
import os
import signal

import pytest
from conftest import flags, metrics, refuses, start, wait_for
from matplotlib.figure import Figure
from PIL import Image

import checkpoint
import compare
from evaluation import plots


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory):
    """Two configurations of a tiny network, one without data, two seeds each: the work of 24 forward passes."""
    folder = tmp_path_factory.mktemp("compare")
    half = f"dataset: mnist5k\ndata_dir: {folder}\ndfake_gen_update_ratio: 2"
    for name, options in (("half", half), ("sid", "dataset: none\nobjective: sid\ndfake_gen_update_ratio: 1")):
        (folder / f"{name}.yaml").write_text(f"{options}\nbatch_size: 16\nlog_every: 1\n")
    arguments = ["--configs", folder / "sid.yaml", folder / "half.yaml"]
    arguments += ["--teacher_checkpoint", runs / "teacher" / "teacher_final.pt", "--seeds", 0, 1]
    arguments += ["--output_dir", folder / "out", "--num_samples", 20, "--device", "cpu"]
    compare.main(flags(*arguments, forward_passes=24))
    return folder, arguments


def test_equal_work_is_told_in_a_table_with_all_metrics(compared):
    folder, _ = compared
    table = (folder / "out" / "compare.md").read_text()
    assert table.startswith("24 forward passes each")
    found = json.loads((folder / "out" / "compare.json").read_text())["configurations"]
    steps = {name: [[point["step"] for point in one["points"]] for one in runs] for name, runs in found.items()}
    # 4 + 4 / 2 = 6 passes per iteration; with SiD at ratio 1 both turns, 7 + 3
    assert steps["half"] == [[1, 2, 3, 4]] * 2 and steps["sid"][0][-1] == 2
    for name in ("half", "sid"):
        (row,) = [line for line in table.splitlines() if line.startswith(f"| {name} ")]
        values = [one["points"][-1]["recall"] for one in found[name]]
        assert row.split(" | ")[1] == "2" and f"{sum(values) / 2:.4g}" in row
        minutes = [point["minutes"] for point in found[name][0]["points"]]
        assert minutes == sorted(minutes) and minutes[0] > 0
    assert Image.open(folder / "out" / "compare.png").width > 100


def test_only_what_is_missing_or_damaged_is_done_again(compared):
    """An evaluation, and a run whose last checkpoints are lost: the rest is trained, and ends with the same weights."""
    folder, arguments = compared
    out, run = folder / "out", folder / "out" / "half" / "seed_1"
    damaged = out / "sid" / "seed_0" / "evaluation.json"
    whole, before = damaged.read_text(), metrics(run)
    damaged.write_text(whole[:100])
    for name in ("settings.json", "compare.json"):
        (out / name).write_text("{")
    for name in ("dmd2_final.pt", "dmd2_checkpoint_step_4.pt", "dmd2_checkpoint_step_3.pt", "evaluation.json"):
        (run / name).unlink()
    kept = {file: file.stat().st_mtime_ns for file in [*out.rglob("*.pt"), *out.rglob("evaluation.json")]}
    compare.main(flags(*arguments, forward_passes=24))
    assert len(kept) > 10 and [file for file in kept if file.stat().st_mtime_ns != kept[file]] == [damaged]
    found = json.loads(whole)["rows"][0] | {"noise": 0}
    assert json.loads(damaged.read_text())["rows"][0] | {"noise": 0} == pytest.approx(found)
    after = metrics(run)
    assert [row["step"] for row in after] == [1, 2, 3, 4]
    assert after[-1]["loss_fake_mean"] == before[-1]["loss_fake_mean"]


def test_results_of_other_options_are_not_taken_for_these(compared):
    """Of the training, of the evaluation, of the work, or of another teacher, even if it has the same name."""
    folder, arguments = compared
    out, settings = folder / "out", folder / "out" / "settings.json"
    command = ["compare.py", *arguments, "--forward_passes", 24]
    refuses(f"{out} holds results for forward_passes 24.0, not 48.0", *command, "--forward_passes", 48)
    refuses(f"{out} holds results for num_samples 20, not 40", *command, "--num_samples", 40)
    refuses("give --forward_passes, for equal work, or --step_number", *command, "--step_number", 4)
    text = (folder / "half.yaml").read_text()
    (folder / "half.yaml").write_text(text + "generator_lr: 1e-3\n")
    refuses(f"{out / 'half'} holds results for generator_lr 2e-06, not 0.001", *command)
    (folder / "half.yaml").write_text(text + f"generator_checkpoint: {arguments[4]}\n")
    refuses(f"{out / 'half'} holds results for generator_checkpoint None, not {arguments[4]} (SHA-256 ", *command)
    (folder / "half.yaml").write_text(text)
    text = settings.read_text()
    settings.write_text(text.replace("SHA-256 ", "SHA-256 0"))
    refuses(f"{out} holds results for teacher_checkpoint {arguments[4]} (SHA-256 0", *command)
    settings.write_text(text)
    (folder / "same").mkdir()
    (folder / "same" / "half.yaml").write_text("")
    same = ["--configs", folder / "half.yaml", folder / "same" / "half.yaml"]
    refuses("--configs: two files have the same name", *command, *same)


def test_metrics_of_two_classifiers_are_not_compared(compared):
    folder, arguments = compared
    file = folder / "out" / "sid" / "seed_0" / "evaluation.json"
    text = file.read_text()
    found = json.loads(text)
    found["rows"][0]["frechet_distance"] *= 1.01
    file.write_text(json.dumps(found))
    refuses(f"{file} and that of the teacher differ for real images", "compare.py", *arguments, "--forward_passes", 24)
    file.write_text(text)


@pytest.mark.parametrize("number, to_group, status", [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143)])
def test_a_stopped_comparison_saves_the_training_at_hand(compared, tmp_path, number, to_group, status):
    """Ctrl-C reaches the whole group of processes, SIGTERM compare.py alone."""
    _, arguments = compared
    options = dict(step_number=1_000_000, output_dir=tmp_path, precision="bf16")
    process = start("compare.py", *arguments, **options, preexec_fn=os.setsid)
    run = tmp_path / "sid" / "seed_0"
    wait_for(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text(), process)
    (os.killpg if to_group else os.kill)(process.pid, number)
    assert process.wait(60) == status, process.communicate()
    (saved,) = run.glob("dmd2_checkpoint_step_*.pt")
    config = checkpoint.load(saved)["config"]
    assert config["precision"] == "bf16" and config["step_number"] == 1_000_000


def test_a_checkpoint_of_a_stop_is_no_point_of_the_curve(tmp_path, monkeypatch):
    """All seeds have the same points: a quarter, half, three quarters and all of the run."""
    rows = [{"frechet_distance": 1.0}, *({"step": step} for step in (230, 460, 500, 690, 917))]
    monkeypatch.setattr(compare, "measure", lambda *arguments: rows)
    (tmp_path / "dmd2_final.pt").touch()
    points = compare.points_of(None, None, 0, 917, tmp_path, rows[0])
    assert [point["step"] for point in points] == [230, 460, 690, 917]


def test_students_without_classes_are_compared_by_pixels(unconditional, tmp_path, capsys):
    data = f"dataset: folder\ndata_dir: {unconditional / 'set.zip'}\nbatch_size: 16\nlog_every: 1\n"
    (tmp_path / "one.yaml").write_text(data)
    arguments = ["--configs", tmp_path / "one.yaml", "--teacher_checkpoint", unconditional / "teacher/teacher_final.pt"]
    arguments += ["--features", "pixels", "--seeds", 0, "--num_samples", 20, "--device", "cpu"]
    compare.main(flags(*arguments, output_dir=tmp_path / "out", step_number=2))
    out = capsys.readouterr().out
    assert "\n2 steps each" in out
    (row,) = json.loads((tmp_path / "out" / "compare.json").read_text())["configurations"]["one"]
    assert row["points"][-1]["step"] == 2
    assert row["points"][-1]["recall"] >= 0 and "own_label" not in row["points"][-1]


def test_the_plotted_median_is_over_the_same_step_of_each_seed(tmp_path, monkeypatch):
    """A seed that has lost a checkpoint leaves the others' points where they are."""
    values = dict.fromkeys(plots.RANKED, 1.0) | {"noise": dict.fromkeys(plots.RANKED, 0.1)}
    seeds = [[{"step": step, "minutes": step, **values} for step in steps] for steps in ((2, 4), (1, 2, 4), (1, 2, 4))]
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: lines.extend(figure.axes[0].lines))
    lines = []
    plots.plot_quality(tmp_path / "compare.png", {"one": seeds}, values)
    assert list(lines[1].get_xdata()) == [1, 2, 4] and len(lines[2].get_xdata()) == 8
