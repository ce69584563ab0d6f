"""compare.py as a user runs it: equal work, the files that it writes, and no work done twice."""

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, TINY_NET, metrics, run_script, succeed
from PIL import Image
from test_config import assert_refused
from test_trust import wait_for

import checkpoint
import compare
from support import plots
from support.config import DMD2, parse_args


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory):
    """Two configurations of a tiny network with two seeds each, for the arithmetic of 24 forward passes of a batch."""
    folder = tmp_path_factory.mktemp("compare")
    for name, options in (("half", "dfake_gen_update_ratio: 2"), ("sid", "objective: sid\ndfake_gen_update_ratio: 1")):
        (folder / f"{name}.yaml").write_text(f"dataset: mnist5k\ndata_dir: {folder}\nbatch_size: 16\nlog_every: 1\n{options}\n")
    configs = [
        "--configs",
        folder / "half.yaml",
        folder / "sid.yaml",
        "--teacher_checkpoint",
        runs / "teacher" / "teacher_final.pt",
    ]
    arguments = [*configs, "--seeds", 0, 1, "--output_dir", folder / "out", "--num_samples", 20, "--device", "cpu"]
    return folder, arguments, succeed("compare.py", *arguments, "--forward_passes", 24)


def test_equal_work_is_told_in_a_table_with_all_figures(compared):
    folder, _, out = compared
    table = (folder / "out" / "compare.md").read_text()
    assert table.splitlines()[0].startswith("24 forward passes each") and table.splitlines()[-1] in out
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
    grid, gap, scale = 8 * (8 + 2), 8, 8  # four sets of 8x8 images of side 8: three in a row, and one below
    assert Image.open(folder / "out" / "pictures.png").size == (scale * (3 * grid + 2 * gap), scale * (2 * grid + gap))


def test_the_work_of_a_student_of_several_steps_is_the_mean_of_its_levels(compared):
    """Three levels take 0, 1 and 2 passes more per batch of images, whatever the ratio."""
    _, arguments, _ = compared
    for ratio in (1, 3):
        options = parse_args(DMD2, None, ["--config", str(arguments[1]), *map(str, arguments[3:5])])
        options.dfake_gen_update_ratio = ratio
        one = compare.passes_per_iteration(options)
        options.student_sigmas = [80.0, 5.0, 1.0]
        assert compare.passes_per_iteration(options) == pytest.approx(one + 1, rel=1e-6)


def test_what_is_done_is_not_done_again(compared):
    folder, arguments, _ = compared
    files = [*(folder / "out").rglob("*.pt"), *(folder / "out").rglob("evaluation.json")]
    before = {file: file.stat().st_mtime_ns for file in files}
    succeed("compare.py", *arguments, "--forward_passes", 24)
    assert len(before) > 10 and {file: file.stat().st_mtime_ns for file in files} == before


def test_a_run_with_other_options_is_not_taken_for_this_one(compared):
    folder, arguments, _ = compared
    text = (folder / "half.yaml").read_text()
    (folder / "half.yaml").write_text(text + "generator_lr: 1e-3\n")
    done = run_script("compare.py", *arguments, "--forward_passes", 24)
    (folder / "half.yaml").write_text(text)
    assert_refused(done, f"{folder / 'out' / 'half' / 'seed_0'} was trained with generator_lr 2e-06, not 0.001")
    (folder / "same").mkdir()
    (folder / "same" / "half.yaml").write_text(text)
    done = run_script(
        "compare.py", "--minutes", 1, *arguments[3:], "--configs", folder / "half.yaml", folder / "same" / "half.yaml"
    )
    assert_refused(done, "--configs: two files have the same name")


def test_results_of_another_budget_or_evaluation_are_not_taken_for_these(compared):
    folder, arguments, _ = compared
    done = run_script("compare.py", *arguments, "--forward_passes", 48)
    assert_refused(done, f"{folder / 'out'} holds results for forward_passes 24.0, not 48.0")
    done = run_script("compare.py", *arguments, "--forward_passes", 24, "--num_samples", 40)
    assert_refused(done, f"{folder / 'out'} holds results for num_samples 20, not 40")


@pytest.mark.parametrize("number, to_group, status", [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143)])
def test_a_stopped_comparison_saves_the_training_at_hand(compared, tmp_path, number, to_group, status):
    """Ctrl-C reaches the whole group of processes, SIGTERM compare.py alone."""
    _, arguments, _ = compared
    command = [
        sys.executable,
        ROOT / "compare.py",
        *arguments,
        "--forward_passes",
        1e6,
        "--output_dir",
        tmp_path,
        "--precision",
        "bf16",
    ]
    process = subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, text=True, start_new_session=True)
    run = tmp_path / "half" / "seed_0"
    wait_for(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text(), process)
    (os.killpg if to_group else os.kill)(process.pid, number)
    assert process.wait(60) == status, process.communicate()
    (saved,) = run.glob("dmd2_checkpoint_step_*.pt")
    assert checkpoint.load(saved)["config"]["precision"] == "bf16"


def test_figures_of_two_judges_are_not_compared(compared):
    folder, arguments, _ = compared
    file = folder / "out" / "sid" / "seed_0" / "evaluation.json"
    text = file.read_text()
    found = json.loads(text)
    found["rows"][0]["frechet_distance"] *= 1.01
    file.write_text(json.dumps(found))
    done = run_script("compare.py", *arguments, "--forward_passes", 24)
    file.write_text(text)
    assert_refused(done, f"{file} and that of the teacher differ for real images")


def test_results_of_another_teacher_are_not_taken_for_these(compared):
    """Not even if it has the same name."""
    folder, arguments, _ = compared
    settings = folder / "out" / "settings.json"
    text = settings.read_text()
    settings.write_text(text.replace("SHA-256 ", "SHA-256 0"))
    done = run_script("compare.py", *arguments, "--forward_passes", 24)
    settings.write_text(text)
    assert_refused(done, f"{folder / 'out'} holds results for teacher_checkpoint {arguments[4]} (SHA-256 0")


def test_a_checkpoint_of_a_stop_is_no_point_of_the_curve(tmp_path, monkeypatch):
    """All seeds have the same points: a quarter, half, three quarters and all of the run."""
    rows = [{"frechet_distance": 1.0}, *({"step": step} for step in (230, 460, 500, 690, 917))]
    monkeypatch.setattr(compare, "measure", lambda *arguments: rows)
    (tmp_path / "metrics.jsonl").write_text('{"step": 917, "fake_lag": 0.2}\n')
    result = compare.result_of(None, compare.Namespace(output_dir=tmp_path, seed=0), rows[0])
    assert [point["step"] for point in result["points"]] == [230, 460, 690, 917]


def test_a_run_that_was_stopped_is_gone_on_with(compared):
    """Its last checkpoint and its evaluation are lost: the rest is trained, and the weights come out as before."""
    folder, arguments, _ = compared
    run = folder / "out" / "half" / "seed_1"
    before = metrics(run)
    for name in ("dmd2_final.pt", "dmd2_checkpoint_step_4.pt", "dmd2_checkpoint_step_3.pt", "evaluation.json"):
        (run / name).unlink()
    succeed("compare.py", *arguments, "--forward_passes", 24)
    after = metrics(run)
    assert [row["step"] for row in after] == [1, 2, 3, 4] and after[-1]["loss_fake_mean"] == before[-1]["loss_fake_mean"]


def test_students_without_classes_are_compared_by_pixels(runs, tmp_path):
    data = ["--dataset", "mnist5k", "--data_dir", tmp_path, "--device", "cpu"]
    succeed("train_teacher.py", *TINY, *TINY_NET, *data, "--label_dim", 0, "--output_dir", tmp_path / "teacher")
    (tmp_path / "one.yaml").write_text(f"dataset: mnist5k\ndata_dir: {tmp_path}\nbatch_size: 16\nlog_every: 1\n")
    arguments = ["--configs", tmp_path / "one.yaml", "--teacher_checkpoint", tmp_path / "teacher" / "teacher_final.pt"]
    arguments += ["--features", "pixels", "--seeds", 0, "--forward_passes", 9, "--num_samples", 20, "--device", "cpu"]
    out = succeed("compare.py", *arguments, "--output_dir", tmp_path / "out")
    assert "pictures.png: real images, teacher, one, from left to right" in out
    (row,) = json.loads((tmp_path / "out" / "compare.json").read_text())["configurations"]["one"]
    assert row["points"][-1]["recall"] >= 0 and "own_label" not in row["points"][-1]


def test_minutes_become_iterations_by_the_pace_of_a_trial(runs, tmp_path, monkeypatch):
    """The pace comes from the last line in metrics.jsonl of a trial of 40 iterations; here that line is given."""
    teacher = str(runs / "teacher" / "teacher_final.pt")
    options = parse_args(DMD2, "", [*TINY, "--teacher_checkpoint", teacher, "--dfake_gen_update_ratio", "2"])

    def trial(script, given):
        assert script == "train_dmd2.py" and given["step_number"] == 40 and given["output_dir"] != options.output_dir
        with open(f"{given['output_dir']}/metrics.jsonl", "w") as file:
            print('{"step": 20, "images_per_second": 1.0}\n{"step": 40, "images_per_second": 80.0}', file=file)

    monkeypatch.setattr(compare, "run", trial)
    args = compare.Namespace(minutes=2.0, forward_passes=None)
    assert compare.steps_of(args, tmp_path, options) == 2 * 60 * 80 / 16


def test_the_plotted_median_is_over_the_same_step_of_each_seed(tmp_path, monkeypatch):
    """A seed that has lost a checkpoint leaves the others' points where they are."""
    figures = dict.fromkeys(plots.CURVES, 1.0)
    seeds = [{"points": [{"step": step, "minutes": step, **figures} for step in steps]} for steps in ((2, 4), (1, 2, 4), (1, 2, 4))]
    monkeypatch.setattr(plots, "save", lambda figure, path: lines.extend(figure.axes[0].lines))
    lines = []
    plots.plot_comparison(figures, {"one": seeds}, tmp_path / "compare.png")
    assert list(lines[1].get_xdata()) == [1, 2, 4] and len(lines[2].get_xdata()) == 8
