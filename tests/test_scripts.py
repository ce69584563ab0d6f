import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    TINY_NET,
    metrics,
    needs_muon,
    run_script,
    succeed,
    tiny_unet,
    torchrun,
    write_images,
    write_zip,
)
from edm_files import write_edm
from PIL import Image
from test_docs import PAGES, commands
from test_options import assert_refused

import checkpoint
from sampling import class_noise, one_step_sampler, student_sampler
from support.images import to_uint8

TEACHER_KEYS = {"model_state_dict", "ema_state_dict", "optimizer_state_dict", "step", "model_config", "config"}
DMD2_KEYS = {
    "feedforward_model_state_dict",
    "ema_state_dict",
    "guidance_fake_unet_state_dict",
    "guidance_cls_state_dict",
    "optimizer_generator_state_dict",
    "optimizer_guidance_state_dict",
    "student_sigmas",
    "step",
    "model_config",
    "config",
}


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def assert_same(ours, theirs):
    """Equal to the bit, through nested containers."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b)
    elif torch.is_tensor(ours):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


def assert_same_run(ours, theirs):
    """Two final checkpoints are equal in everything but their options (such as the folder) and versions."""
    assert_same(*({k: v for k, v in load(path).items() if k not in ("config", "versions")} for path in (ours, theirs)))


def test_what_the_training_scripts_write(runs):
    names = {path.name for path in (runs / "teacher").iterdir()}
    assert {
        "teacher_checkpoint_step_2.pt",
        "teacher_checkpoint_step_4.pt",
        "teacher_final.pt",
        "metrics.jsonl",
    } <= names
    names = {path.name for path in (runs / "dmd2").iterdir()}
    assert {"dmd2_checkpoint_step_2.pt", "dmd2_final.pt", "metrics.jsonl"} <= names
    assert load(runs / "teacher" / "teacher_final.pt").keys() >= TEACHER_KEYS
    state = load(runs / "dmd2" / "dmd2_final.pt")
    assert state.keys() >= DMD2_KEYS and state["step"] == 4
    assert [row["step"] for row in metrics(runs / "teacher")] == [1, 2, 3, 4]
    rows = metrics(runs / "dmd2")
    trained = [("loss_dm" in row, "gen_cls_loss" in row, "loss_fake_mean" in row) for row in rows]
    assert trained == [(True,) * 3, (False, False, True)] * 2
    assert {"real_logit", "fake_logit", "guidance_grad_norm", "fake_std", "images_per_second"} <= rows[0].keys()
    grid = Image.open(runs / "dmd2" / "samples" / "step_0000004.png")
    assert grid.width > 2 * 8 * 8 and grid.height > 10 * 8  # teacher and student side by side, one row per class


def test_averaged_weights_are_what_is_loaded(runs):
    for file in (runs / "teacher" / "teacher_final.pt", runs / "dmd2" / "dmd2_final.pt"):
        net, state = checkpoint.load_network(file), load(file)
        raw = "model_state_dict" if "model_state_dict" in state else "feedforward_model_state_dict"
        assert not net.training and net.config == state["model_config"]
        assert_same(dict(net.state_dict()), dict(state["ema_state_dict"]))
        assert any(not torch.equal(state["ema_state_dict"][key], value) for key, value in state[raw].items())


@pytest.mark.parametrize("stage", ["teacher", "dmd2"])
def test_resume_is_bit_identical(runs, tmp_path, stage):
    """Stopped after 2 of 4 steps and after 3, against the run that never stopped."""
    arguments = [*TINY, "--output_dir", tmp_path, "--save_every", 1, "--log_every", 1]
    if stage == "teacher":
        arguments += TINY_NET
    else:
        teacher = runs / "teacher" / "teacher_final.pt"
        arguments += [
            "--teacher_checkpoint",
            teacher,
            "--dfake_gen_update_ratio",
            2,
            "--gan_classifier",
            "--ema_decay",
            "0.5",
        ]
    script = f"train_{stage}.py"
    succeed(
        script,
        *arguments,
        "--resume_from_checkpoint",
        runs / stage / f"{stage}_checkpoint_step_2.pt",
        "--step_number",
        3,
    )
    os.remove(tmp_path / f"{stage}_final.pt")
    succeed(script, *arguments, "--resume_from_checkpoint", "latest")
    assert_same_run(tmp_path / f"{stage}_final.pt", runs / stage / f"{stage}_final.pt")
    ours, theirs = metrics(tmp_path), metrics(runs / stage)[2:]
    for row in (*ours, *theirs):
        del row["images_per_second"]
    assert ours == theirs and [row["step"] for row in ours] == [3, 4]


@needs_muon
@pytest.mark.parametrize("stage", ["teacher", "dmd2"])
def test_a_run_with_muon_resumes_bit_identically(runs, tmp_path, stage):
    """Its optimizers are in the checkpoint. AdamW cannot go on from them, nor Muon from AdamW's."""
    script = f"train_{stage}.py"
    optimizers = ["optimizer_state_dict"]
    arguments = [*TINY, "--optimizer", "muon", "--save_every", 2]
    if stage == "teacher":
        arguments += [*TINY_NET, "--lr", "1e-3"]
    else:
        optimizers = ["optimizer_generator_state_dict", "optimizer_guidance_state_dict"]
        teacher = runs / "teacher" / "teacher_final.pt"
        arguments += ["--teacher_checkpoint", teacher, "--dfake_gen_update_ratio", 2, "--gan_classifier"]
    succeed(script, *arguments, "--output_dir", tmp_path / "run")
    source = ["--resume_from_checkpoint", tmp_path / "run" / f"{stage}_checkpoint_step_2.pt"]
    succeed(script, *arguments, *source, "--output_dir", tmp_path / "resumed")
    assert_same_run(*(tmp_path / folder / f"{stage}_final.pt" for folder in ("resumed", "run")))
    state = load(tmp_path / "run" / f"{stage}_final.pt")
    assert all(len(state[name]["muon"]["state"]) > 10 for name in optimizers)
    adamw = [
        "--resume_from_checkpoint",
        runs / stage / f"{stage}_checkpoint_step_2.pt",
        "--output_dir",
        tmp_path / "mixed",
    ]
    for options in ([*source, "--optimizer", "adamw"], adamw):
        done = run_script(script, *arguments, *options)
        assert_refused(done, f"its {optimizers[0]} does not fit; resume it with the options of its run")


@pytest.mark.parametrize("stage", ["teacher", "dmd2"])
def test_a_resume_takes_the_options_of_its_run(runs, tmp_path, stage):
    """All but the device and W&B's. The result is that of the run that never stopped, in its folder."""
    shutil.copytree(runs / stage, tmp_path / "moved")
    source = tmp_path / "moved" / f"{stage}_checkpoint_step_2.pt"
    state = load(source)
    state["config"] |= {"wandb": True, "wandb_key": "a stranger's", "wandb_dir": "/theirs"}  # not theirs to choose
    checkpoint.save(source, state)
    more = ["--device", "cpu", "--wandb_run_name", "für alle"]
    told = succeed(f"train_{stage}.py", "--resume_from_checkpoint", source, *more, cwd=tmp_path)
    assert (
        f"going on from {source} at step 2" in told and "--lr_warmup_steps 500 is more than the run's 4 steps" in told
    )
    lines = [re.findall(r"\w*loss\w*", line) for line in told.splitlines() if line.startswith("step ")]
    columns = {"teacher": 1, "dmd2": 4}[stage]  # which keep their places
    assert len(lines) == 2 and lines[0] == lines[1] and len(lines[0]) == columns
    ours, theirs = (load(folder / f"{stage}_final.pt")["config"] for folder in (tmp_path / "moved", runs / stage))
    changed = {
        "wandb_run_name": "für alle",
        "output_dir": str(tmp_path / "moved"),
        "resume_from_checkpoint": str(source),
    }
    assert ours == theirs | changed
    assert "wandb_run_name: für alle" in (tmp_path / "moved" / "config.yaml").read_text(encoding="utf-8")
    assert_same_run(tmp_path / "moved" / f"{stage}_final.pt", runs / stage / f"{stage}_final.pt")


def test_what_a_resume_takes_is_checked(runs, tmp_path):
    """Together with the given options: a batch of 16 has no 3 equal parts. Values in a checkpoint are not trusted."""
    options = [
        "--resume_from_checkpoint",
        runs / "teacher" / "teacher_checkpoint_step_2.pt",
        "--output_dir",
        tmp_path / "out",
    ]
    done = run_script("train_teacher.py", *options, "--grad_accum", 3)
    assert_refused(done, "--batch_size 16 must be divisible by --grad_accum 3")
    assert_refused(run_script("train_teacher.py", *options, "--overwrite"), "give one of them")
    state = load(runs / "teacher" / "teacher_checkpoint_step_2.pt")
    state["config"]["lr"] = "fast"
    checkpoint.save(tmp_path / "bad.pt", state)
    done = run_script(
        "train_teacher.py", "--resume_from_checkpoint", tmp_path / "bad.pt", "--output_dir", tmp_path / "out"
    )
    assert_refused(done, f"checkpoint {tmp_path}/bad.pt: lr needs a number, not 'fast'")
    state["config"] |= {"lr": 1e-4, "data_dir": str(tmp_path / "theirs")}
    checkpoint.save(tmp_path / "bad.pt", state)
    done = run_script(
        "train_teacher.py", "--resume_from_checkpoint", tmp_path / "bad.pt", "--output_dir", tmp_path / "out"
    )
    assert_refused(done, "which is not here: give --data_dir")
    assert not (tmp_path / "theirs").exists()
    assert not (tmp_path / "out").exists()


def test_a_missing_teacher_is_named_by_its_option(tmp_path):
    done = run_script("train_dmd2.py", *TINY, cwd=tmp_path)
    assert_refused(
        done, "--teacher_checkpoint ./log/checkpoints/teacher/teacher_final.pt: there is no such file; train_teacher.py"
    )


def test_latest_without_checkpoints_is_refused(tmp_path):
    done = run_script(
        "train_teacher.py", *TINY, *TINY_NET, "--output_dir", tmp_path / "x", "--resume_from_checkpoint", "latest"
    )
    assert_refused(done, "no checkpoints in")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("what", ["missing", "text", "truncated", "bit flip", "foreign", "architecture", "hostile"])
def test_unfit_checkpoints_are_refused(runs, tmp_path, what):
    file, trace = tmp_path / "bad.pt", tmp_path / "it-ran"
    good = (runs / "teacher" / "teacher_final.pt").read_bytes()
    if what == "text":
        file.write_text("no checkpoint")
    elif what == "truncated":
        file.write_bytes(good[: len(good) // 2])
    elif what == "bit flip":
        file.write_bytes(good[: len(good) // 2] + bytes([good[len(good) // 2] ^ 1]) + good[len(good) // 2 + 1 :])
    elif what == "architecture":
        state = load(runs / "teacher" / "teacher_final.pt")
        checkpoint.save(file, {**state, "model_config": {**state["model_config"], "num_blocks": 2}})
    elif what == "foreign":
        torch.save({"weights": torch.zeros(3)}, file)
    elif what == "hostile":

        class Hostile:
            def __reduce__(self):
                return os.system, (f"touch {trace}",)

        torch.save({"step": Hostile(), "model_config": {}, "config": {}}, file)
    for script, flag in (("generate.py", "--checkpoint"), ("train_dmd2.py", "--teacher_checkpoint")):
        assert_refused(run_script(script, flag, file, "--output_dir", tmp_path / "out"), f"checkpoint {file}")
    assert not trace.exists() and not (tmp_path / "out").exists()


def test_a_checkpoint_of_the_wrong_kind_is_refused(runs, tmp_path):
    teacher, student = runs / "teacher" / "teacher_final.pt", runs / "dmd2" / "dmd2_final.pt"
    out = ["--output_dir", tmp_path / "out"]
    assert_refused(
        run_script("train_dmd2.py", *TINY, *out, "--teacher_checkpoint", student),
        "a generator; give a teacher's checkpoint",
    )
    done = run_script(
        "train_dmd2.py", *TINY, *out, "--teacher_checkpoint", teacher, "--resume_from_checkpoint", teacher
    )
    assert_refused(done, "not a generator with the teacher's network")
    done = run_script("train_teacher.py", *TINY, *out, "--img_resolution", 16, "--resume_from_checkpoint", teacher)
    assert_refused(done, "not a teacher with this network")
    done = run_script("train_dmd2.py", *TINY, *out, "--no-gan_classifier", "--resume_from_checkpoint", student)
    assert_refused(done, "trained with --gan_classifier")
    write_images(tmp_path / "letters", classes="abcdefghij", each=2, size=8)
    data = ["--dataset", "folder", "--data_dir", tmp_path / "letters", "--teacher_checkpoint", teacher]
    succeed(
        "train_dmd2.py", *TINY, *data, "--output_dir", tmp_path / "letters_of_a_digits_teacher"
    )  # numbers name any classes
    write_images(tmp_path / "set", each=8, size=8)
    data = ["--dataset", "folder", "--data_dir", tmp_path / "set", "--teacher_checkpoint", teacher]
    assert_refused(run_script("train_dmd2.py", *TINY, *data, *out), "knows 10 classes; the data set folder has 2")
    assert not (tmp_path / "out").exists()


OBJECTIVES = {
    "sid": ["--objective", "sid", "--conditioning_sigma", 2.5, "--min_step_percent", 0, "--max_step_percent", 0.8],
    "sid with heads": ["--objective", "sid", "--gan_classifier", "--gan_features", "fake", "--gan_resolutions", 8, 4],
    "few steps": ["--student_steps", 3, "--conditioning_sigma", 3],
    "few steps, two guidance updates": [
        "--student_sigmas",
        80,
        5,
        "--guidance_updates",
        2,
        "--fake_loss_weighting",
        "none",
    ],
    "heads with an optimizer of their own": ["--gan_classifier", "--gan_lr", 1e-3, "--no-clip_guidance"],
    "f-divergence": [
        "--f_divergence",
        "js",
        "--gan_classifier",
        "--gan_features",
        "teacher",
        "--gan_resolutions",
        8,
        4,
    ],
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_train_and_go_on(runs, tmp_path, name):
    """Stopped after 2 of 4 steps, against the run that never stopped."""
    teacher = ["--teacher_checkpoint", runs / "teacher" / "teacher_final.pt"]
    arguments = [*TINY, *teacher, *OBJECTIVES[name], "--dfake_gen_update_ratio", 1, "--save_every", 2, "--log_every", 1]
    succeed("train_dmd2.py", *arguments, "--output_dir", tmp_path / "straight")
    resume = [
        "--resume_from_checkpoint",
        tmp_path / "straight" / "dmd2_checkpoint_step_2.pt",
        "--output_dir",
        tmp_path / "resumed",
    ]
    succeed("train_dmd2.py", *arguments, *resume)
    assert_same_run(*(tmp_path / run / "dmd2_final.pt" for run in ("resumed", "straight")))
    rows = metrics(tmp_path / "straight")
    assert all(
        np.isfinite(row["loss_dm"]) and ("gen_cls_loss" in row) == ("--gan_classifier" in arguments) for row in rows
    )


def test_turns_can_alternate(runs, tmp_path):
    """As in FastGen: no guidance update where the generator is updated; the log says which iterations had which."""
    arguments = [
        *TINY,
        "--teacher_checkpoint",
        runs / "teacher" / "teacher_final.pt",
        "--output_dir",
        tmp_path,
        "--log_every",
        1,
    ]
    succeed("train_dmd2.py", *arguments, "--alternate_turns", "--dfake_gen_update_ratio", 2)
    had = [("loss_dm" in row, "loss_fake_mean" in row) for row in metrics(tmp_path)]
    assert had == [(True, False), (False, True)] * 2


def test_a_student_of_several_steps_is_sampled_at_its_levels(runs, tmp_path):
    """Every script finds them in the checkpoint; a resume that asks for others is refused."""
    arguments = [*TINY, "--teacher_checkpoint", runs / "teacher" / "teacher_final.pt", "--output_dir", tmp_path / "run"]
    succeed("train_dmd2.py", *arguments, "--student_steps", 2, "--save_every", 2)
    final = tmp_path / "run" / "dmd2_final.pt"
    sigmas = load(final)["student_sigmas"]
    assert sigmas[0] == 80 and len(sigmas) == 2 and 2 < sigmas[1] < 3  # half way down the schedule
    data = ["--checkpoint", final, "--features", "classifier", "--num_samples", 20, "--data_dir", tmp_path]
    succeed("evaluate.py", *data, "--device", "cpu", "--batch_size", 7)
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["rows"][1]["evaluations"] == 2
    for batch_size in (7, 100):
        out = ["--format", "npz", "--output_dir", tmp_path / str(batch_size), "--num_samples", 2, "--device", "cpu"]
        succeed("generate.py", "--checkpoint", final, *out, "--batch_size", batch_size)
    ours, theirs = (np.load(tmp_path / name / "samples.npz")["images"] for name in ("7", "100"))
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    resume = ["--resume_from_checkpoint", tmp_path / "run" / "dmd2_checkpoint_step_2.pt"]
    done = run_script(
        "train_dmd2.py", *arguments[:-2], "--output_dir", tmp_path / "other", "--student_steps", 4, *resume
    )
    assert_refused(done, "a student at sigma [80.0, ")


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=needs_muon)])
def test_the_steps_of_a_student_take_turns(runs, tmp_path, optimizer):
    """The first one's fake_unet is trained at step 0, the second one's up to the next generator turn, and so on."""
    teacher = runs / "teacher" / "teacher_final.pt"
    arguments = [*TINY, "--teacher_checkpoint", teacher, "--student_sigmas", 80, 5, 1, "--dfake_gen_update_ratio", 2]
    arguments += ["--optimizer", optimizer, "--save_every", 1, "--keep_last", 9, "--output_dir", tmp_path]
    succeed("train_dmd2.py", *arguments)
    start, trained = load(teacher)["ema_state_dict"]["conv_in.weight"], []
    for step in (1, 2, 3, 4):
        fakes = load(tmp_path / f"dmd2_checkpoint_step_{step}.pt")["guidance_fake_unet_state_dict"]
        trained.append([not torch.equal(fakes[f"{index}.conv_in.weight"], start) for index in range(3)])
    assert trained == [[True, False, False], [True, True, False], [True, True, False], [True, True, True]]


def test_resolutions_that_the_teacher_lacks_are_refused(runs, tmp_path):
    arguments = [
        "--teacher_checkpoint",
        runs / "teacher" / "teacher_final.pt",
        "--gan_classifier",
        "--gan_resolutions",
        16,
        4,
    ]
    done = run_script("train_dmd2.py", *TINY, *arguments, "--output_dir", tmp_path / "out")
    assert_refused(done, "gan_resolutions 16: the teacher's encoder has 8, 4")
    assert not (tmp_path / "out").exists()
    resume = [
        "--gan_resolutions",
        8,
        4,
        "--resume_from_checkpoint",
        runs / "dmd2" / "dmd2_final.pt",
    ]  # which has one head
    done = run_script("train_dmd2.py", *TINY, *arguments[:3], *resume, "--output_dir", tmp_path / "out")
    assert_refused(done, "does not fit; resume it with the options of its run")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none_is_refused(tmp_path):
    done = run_script("train_teacher.py", "--dataset", "mnist5k", "--device", "cuda", "--output_dir", tmp_path / "out")
    assert_refused(done, "--device cuda: this machine has 0 CUDA devices")


def test_both_stages_on_a_zip_with_colours(tmp_path):
    """EDM's ZIP layout through teacher, DMD2 and generation, with three channels."""
    data = ["--dataset", "folder", "--data_dir", write_zip(tmp_path / "set.zip", labels=[0, 1, 2] * 8, size=16)]
    succeed("train_teacher.py", *TINY, *TINY_NET, *data, "--output_dir", tmp_path / "teacher")
    teacher = tmp_path / "teacher" / "teacher_final.pt"
    succeed("train_dmd2.py", *TINY, *data, "--teacher_checkpoint", teacher, "--output_dir", tmp_path / "dmd2")
    state = load(tmp_path / "dmd2" / "dmd2_final.pt")
    assert state["class_names"] == ["0", "1", "2"]
    assert state["model_config"]["img_channels"] == 3 and state["model_config"]["label_dim"] == 3
    assert "ema_state_dict" not in state and "guidance_cls_state_dict" not in state
    succeed("generate.py", "--checkpoint", tmp_path / "dmd2" / "dmd2_final.pt", "--output_dir", tmp_path / "images")
    assert (tmp_path / "images" / "2_samples.png").exists()


# ---- without classes ------------------------------------------------------------------------------------------------


def test_both_stages_without_classes(unconditional):
    for stage in ("teacher", "dmd2"):
        state = load(unconditional / stage / f"{stage}_final.pt")
        assert state["model_config"]["label_dim"] == 0 and state["class_names"] == [] and state["step"] == 4
        assert not any("embed_class" in name for name in state["ema_state_dict"])
        assert all(np.isfinite(value) for row in metrics(unconditional / stage) for value in row.values())
    grid = Image.open(unconditional / "dmd2" / "samples" / "step_0000004.png")
    assert grid.size == (8 * (2 * 8 * 10 + 8), 8 * 8 * 10)  # 8x8 of the teacher's beside 8x8 of the student's


@pytest.mark.parametrize("stage", ["teacher", "dmd2"])
def test_resume_without_classes_is_bit_identical(unconditional, tmp_path, stage):
    config = unconditional / stage / "config.yaml"
    resume = [
        "--resume_from_checkpoint",
        unconditional / stage / f"{stage}_checkpoint_step_2.pt",
        "--output_dir",
        tmp_path,
    ]
    succeed(f"train_{stage}.py", "--config", config, *resume)
    assert_same_run(*(folder / f"{stage}_final.pt" for folder in (tmp_path, unconditional / stage)))


def test_labels_are_left_out_where_there_are_some(runs, unconditional, tmp_path):
    """With --label_dim 0, images with labels make the same teacher. It is distilled with them, without a GAN."""
    data = ["--dataset", "folder", "--data_dir", write_zip(tmp_path / "set.zip", labels=[0, 1] * 20, size=8)]
    told = succeed("train_teacher.py", *TINY, *TINY_NET, *data, "--label_dim", 0, "--output_dir", tmp_path / "teacher")
    assert "40 images, no classes" in told
    ours, theirs = (
        load(folder / "teacher" / "teacher_final.pt")["ema_state_dict"] for folder in (tmp_path, unconditional)
    )
    assert_same(dict(ours), dict(theirs))
    teacher = ["--teacher_checkpoint", tmp_path / "teacher" / "teacher_final.pt"]
    succeed("train_dmd2.py", *TINY, *data, *teacher, "--output_dir", tmp_path / "dmd2")
    assert load(tmp_path / "dmd2" / "dmd2_final.pt")["class_names"] == []

    data = ["--dataset", "folder", "--data_dir", unconditional / "set.zip", "--output_dir", tmp_path / "out"]
    done = run_script("train_dmd2.py", *TINY, *data, "--teacher_checkpoint", runs / "teacher" / "teacher_final.pt")
    assert_refused(done, "knows 10 classes; the data set folder has none")


def test_two_processes_on_a_large_zip_without_classes(unconditional, tmp_path):
    """Under torchrun one process writes the file of pixels, and both map it."""
    shutil.copy(unconditional / "set.zip", tmp_path / "set.zip")
    (tmp_path / "script.py").write_text(
        f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from readers import image_files; image_files.LARGE = 0\n"
        f"runpy.run_path({str(ROOT / 'train_teacher.py')!r}, run_name='__main__')\n"
    )
    options = [
        *TINY,
        *TINY_NET,
        "--dataset",
        "folder",
        "--data_dir",
        tmp_path / "set.zip",
        "--dropout",
        0,
        "--log_every",
        1,
    ]
    succeed("train_teacher.py", *options, "--output_dir", tmp_path / "one")
    assert not list(tmp_path.glob("*.npy"))
    done = torchrun(tmp_path / "script.py", *options, "--output_dir", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("writing its 40 images") == 1 and len(list(tmp_path.glob("*.npy"))) == 1
    assert [row["step"] for row in metrics(tmp_path / "two")] == [row["step"] for row in metrics(tmp_path / "one")]


def test_batch_larger_than_the_data_is_refused(tmp_path):
    data = ["--dataset", "folder", "--data_dir", write_zip(tmp_path / "set.zip")]
    done = run_script("train_teacher.py", *data, "--batch_size", 7, "--output_dir", tmp_path / "out")
    assert_refused(done, "--batch_size 7 is more than the 6 images")
    assert not (tmp_path / "out").exists()


def test_weights_and_biases_offline_holds_scalars_images_and_checkpoints(runs, tmp_path):
    """The real package, offline, by the README's flags: all of it is in the run's folder, and the key is not."""
    pytest.importorskip("wandb")
    flags = ["--wandb", "--wandb_mode", "offline", "--wandb_project", "minimal-dmd", "--wandb_run_name", "dmd2-mnist"]
    flags += ["--wandb_dir", tmp_path / "wandb", "--wandb_log_every", 2, "--wandb_log_images", "--wandb_log_samples"]
    flags += [
        "--wandb_sample_every",
        2,
        "--wandb_log_checkpoints",
        "--log_every",
        1,
        "--save_every",
        2,
        "--wandb_key",
        "x" * 40,
    ]
    teacher = runs / "teacher" / "teacher_final.pt"
    arguments = [*TINY, "--teacher_checkpoint", teacher, "--output_dir", tmp_path / "out", *flags]
    succeed("train_dmd2.py", *arguments, env={"HOME": str(tmp_path / "home")})
    assert list(
        (tmp_path / "wandb" / "artifacts" / "staging").iterdir()
    )  # copies of checkpoints, to be sent by `wandb sync`
    assert not list((tmp_path / "home").rglob("artifacts"))
    assert "wandb_key" not in load(tmp_path / "out" / "dmd2_final.pt")["config"]

    (run_file,) = (tmp_path / "wandb").glob("wandb/offline-run-*/*.wandb")
    written = run_file.read_bytes()  # wandb's record of the run; names and texts stand in it as they are
    artifact = run_file.stem.removeprefix("run-") + "-checkpoint"
    for name in ("dmd2-mnist", "minimal-dmd", "loss_dm", "guidance_grad_norm", artifact, "generator_lr"):
        assert name.encode() in written, name
    assert b"x" * 40 not in written
    assert len(list(run_file.parent.glob("files/media/images/images_*.png"))) == 2
    assert len(list(run_file.parent.glob("files/media/images/samples_*.png"))) == 2


def test_gradient_accumulation_takes_the_same_steps(tmp_path):
    """A batch in four parts against one: loss and gradient agree."""
    arguments = [*TINY, *TINY_NET, "--log_every", 1, "--dropout", 0]
    for parts in (1, 4):
        succeed("train_teacher.py", *arguments, "--grad_accum", parts, "--output_dir", tmp_path / str(parts))
    for whole, accumulated in zip(metrics(tmp_path / "1"), metrics(tmp_path / "4"), strict=True):
        for name in ("loss", "grad_norm"):
            assert whole[name] == pytest.approx(accumulated[name], rel=1e-4)


def test_without_wandb_it_is_not_imported(tmp_path):
    (tmp_path / "wandb.py").write_text("raise SystemExit('wandb was imported')")
    succeed("train_teacher.py", *TINY, *TINY_NET, "--output_dir", tmp_path / "out", env={"PYTHONPATH": str(tmp_path)})


def test_cifar10_from_torchvisions_files(tmp_path, monkeypatch):
    """The default data set through the real script; a sitecustomize disables torchvision's checksums."""
    from test_data import fabricated_cifar10

    fabricated_cifar10(tmp_path, monkeypatch, n=50)  # of every class
    (tmp_path / "sitecustomize.py").write_text(
        "from torchvision.datasets import CIFAR10 as C\n"
        "C.train_list = [[name, None] for name, _ in C.train_list]\n"
        "C.test_list, C.meta = [['test_batch', None]], {**C.meta, 'md5': None}\n"
    )
    env = {"PYTHONPATH": str(tmp_path)}
    arguments = [
        "--data_dir",
        tmp_path,
        "--batch_size",
        8,
        "--step_number",
        2,
        "--model_channels",
        8,
        "--num_blocks",
        1,
    ]
    succeed("train_teacher.py", *arguments, "--output_dir", tmp_path / "teacher", env=env)
    teacher = tmp_path / "teacher" / "teacher_final.pt"
    arguments = ["--data_dir", tmp_path, "--batch_size", 8, "--step_number", 2, "--teacher_checkpoint", teacher]
    succeed("train_dmd2.py", *arguments, "--output_dir", tmp_path / "dmd2", env=env)
    succeed(
        "generate.py",
        "--checkpoint",
        tmp_path / "dmd2" / "dmd2_final.pt",
        "--output_dir",
        tmp_path / "images",
        "--num_samples",
        2,
    )
    assert (tmp_path / "images" / "airplane_samples.png").exists()


RUN = (
    "README",
    "training-guide",
    "evaluation",
    "generate",
    "performance",
    "cifar10-cpu",
)  # the others need teachers that nobody has here


@pytest.mark.parametrize("group", ["python", "torchrun", "pretrained"])
def test_readme_commands_run_in_order(group, runs, tmp_path, inception_weights):
    """The README's commands and those of some pages, each on what the ones before wrote; scaled down by flags."""
    for name in ("teacher", "dmd2"):
        shutil.copytree(runs / name, tmp_path / "log" / "checkpoints" / name)
    for path in [*ROOT.glob("config_*.yaml"), *ROOT.glob("configs/*.yaml")]:
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        (tmp_path / path.relative_to(ROOT)).write_text(path.read_text())
    write_edm(tmp_path / "edm-cifar10-32x32-cond-vp.pkl")
    write_zip(tmp_path / "cifar10.zip", labels=[*range(10)] * 10, size=8)
    (tmp_path / "my_images").mkdir()  # of which `small` makes digits
    small = {
        "train_teacher.py": [*TINY, *TINY_NET, "--save_every", "2"],
        "train_dmd2.py": [*TINY, "--save_every", "2"],
        "evaluate.py": ["--num_samples", "40", "--features", "classifier", "--steps", "2", "--device", "cpu"],
        "benchmark.py": [*TINY_NET, "--repeats", "1"],
        "generate.py": ["--num_samples", "2"],
    }
    for runner, script, *arguments in [command for page in PAGES if page.stem in RUN for command in commands(page)]:
        pretrained = script in ("import_teacher.py", "export.py", "benchmark.py") or "edm_cifar10" in " ".join(
            arguments
        )
        if group != ("pretrained" if pretrained else runner):
            continue
        if "--wandb" in arguments:
            arguments += ["--wandb_mode", "offline"]
        arguments = [re.sub(r"step_\d+\.pt", "step_2.pt", argument) for argument in arguments]
        if script.startswith("train") and "--resume_from_checkpoint" not in arguments:
            arguments += ["--overwrite"]  # the same run is given by flags, by YAML, and with W&B
        if "--fid_reference" in arguments:  # this needs Inception's features: here with random weights and few images
            np.savez(tmp_path / "cifar10-32x32.npz", mu=np.zeros(2048), sigma=np.eye(2048))
            write_images(tmp_path / "set", classes=[str(digit) for digit in range(10)], each=2, size=8)
            arguments += [
                "--num_samples",
                4,
                "--inception_weights",
                inception_weights,
                "--dataset",
                "folder",
                "--data_dir",
                "set",
            ]
        else:
            arguments += small.get(script, [])
        if script == "train_dmd2.py" and any("edm_cifar10" in argument for argument in arguments):
            arguments += ["--dataset", "folder", "--data_dir", "cifar10.zip"]  # that teacher knows no digits
        if "configs/train1_gan.yaml" in arguments:
            arguments += ["--gan_resolutions", 8]  # these networks have no feature maps at 32 and 16
        if runner == "python":
            succeed(script, *arguments, cwd=tmp_path)
        else:
            done = torchrun(script, *arguments, *["--grad_accum", 1] * script.startswith("train"), cwd=tmp_path)
            assert done.returncode == 0, done.stderr
    evaluated = "log/checkpoints/dmd2/evaluation.json"
    assert (tmp_path / {"python": "generated", "torchrun": evaluated, "pretrained": "generator.onnx"}[group]).exists()


@pytest.mark.slow
def test_teacher_learns_real_digits(tmp_path):
    """Half a minute on mnist5k: an untrained network has a loss near 2.0, 150 steps must bring it below 0.6."""
    arguments = ["--config", ROOT / "configs" / "mnist0.yaml", "--step_number", 150, "--lr_decay", 0]
    arguments += ["--log_every", 10, "--device", "cpu"]
    succeed("train_teacher.py", *arguments, "--output_dir", tmp_path, "--sample_every", 1000)
    rows = metrics(tmp_path)
    assert rows[0]["loss"] > 1.2 and np.mean([row["loss"] for row in rows[-3:]]) < 0.6


def test_load_network_in_a_notebook(tmp_path):
    """Two lines give images, at the levels that the checkpoint names, in a notebook and by generate.py."""
    net = tiny_unet()
    state = {"feedforward_model_state_dict": net.state_dict(), "step": 1, "model_config": net.config, "config": {}}
    for name, sigmas in (("one", [3.0]), ("two", [80.0, 3.0])):
        checkpoint.save(tmp_path / f"{name}.pt", state | {"student_sigmas": sigmas})
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    images = checkpoint.load_sampler(tmp_path / "one.pt")(noise, labels)
    loaded = checkpoint.load_network(tmp_path / "one.pt")
    torch.testing.assert_close(images, one_step_sampler(loaded, noise, labels, 3.0))
    assert not torch.allclose(images, one_step_sampler(net, noise, labels, 80.0), atol=0.01)
    assert json.dumps(loaded.config)
    two_steps = checkpoint.load_sampler(tmp_path / "two.pt")
    images = two_steps(noise, labels)
    torch.testing.assert_close(images, student_sampler(net, noise, labels, [80.0, 3.0]))
    torch.testing.assert_close(images, two_steps(noise, labels))  # independent of torch's own random numbers
    arguments = ["--output_dir", tmp_path, "--num_samples", 1, "--format", "npz"]
    succeed("generate.py", "--checkpoint", tmp_path / "one.pt", *arguments)
    expected = to_uint8(one_step_sampler(net, *class_noise(range(10), 1, (1, 8, 8), 0), 3.0)).int()
    made = torch.from_numpy(np.load(tmp_path / "samples.npz")["images"]).permute(0, 3, 1, 2).int()
    assert (made - expected).abs().max() <= 1
