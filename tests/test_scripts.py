import json
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    TINY_NET,
    assert_refused,
    flags,
    metrics,
    refuses,
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
from test_safe_pickle import hostile_bytes
from torch.utils._pytree import tree_flatten
from torchvision.datasets import CIFAR10

import checkpoint
import train_dmd2
import train_teacher
from generate import load_sampler
from sampling import class_noise, one_step_sampler, student_sampler
from support.images import to_uint8

STAGES = pytest.mark.parametrize("stage", ["teacher", "dmd2"])
OF_BOTH = {"model_config", "config", "step", "ema_state_dict"}
KEYS = {
    "teacher": {"model_state_dict", "optimizer_state_dict"},
    "dmd2": {"optimizer_generator_state_dict", "optimizer_guidance_state_dict", "guidance_fake_unet_state_dict"}
    | {"feedforward_model_state_dict", "guidance_cls_state_dict", "student_sigmas"},
}


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def assert_same(ours, theirs):
    """Equal to the bit, through nested containers."""
    (ours, structure), (theirs, other) = tree_flatten(ours), tree_flatten(theirs)
    assert structure == other
    for a, b in zip(ours, theirs, strict=True):
        assert type(a) is type(b) and (torch.equal(a, b) if torch.is_tensor(a) else a == b)


def assert_same_run(ours, theirs):
    """Two final checkpoints are equal in everything but their options (such as the folder) and versions."""
    assert_same(*({k: v for k, v in load(path).items() if k not in ("config", "versions")} for path in (ours, theirs)))


def final(folder, stage):
    return folder / stage / f"{stage}_final.pt"


def options_of(stage, folder):
    """What `stage` needs to train: a network, or the teacher in `folder`."""
    return TINY_NET if stage == "teacher" else flags(teacher_checkpoint=final(folder, "teacher"))


def test_what_the_training_scripts_write(runs):
    written = {path.name for folder in ("teacher", "dmd2") for path in (runs / folder).iterdir()}
    assert {f"{stage}_checkpoint_step_{step}.pt" for stage in ("teacher", "dmd2") for step in (2, 4)} < written
    for stage in ("teacher", "dmd2"):
        state, rows = load(final(runs, stage)), metrics(runs / stage)
        assert state.keys() >= KEYS[stage] | OF_BOTH and state["step"] == 4
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
    trained = [("loss_dm" in row, "gen_cls_loss" in row, "loss_fake_mean" in row) for row in rows]
    assert trained == [(True,) * 3, (False, False, True)] * 2
    assert {"real_logit", "fake_logit", "guidance_grad_norm", "fake_std", "images_per_second"} <= rows[0].keys()
    grid = Image.open(runs / "dmd2" / "samples" / "step_0000004.png")
    assert grid.width > 2 * 8 * 8 and grid.height > 10 * 8  # teacher and student side by side, one row per class


def test_averaged_weights_are_what_is_loaded(runs):
    for stage, raw in (("teacher", "model_state_dict"), ("dmd2", "feedforward_model_state_dict")):
        net, state = checkpoint.load_network(final(runs, stage)), load(final(runs, stage))
        assert not net.training and net.config == state["model_config"]
        assert_same(dict(net.state_dict()), dict(state["ema_state_dict"]))
        assert any(not torch.equal(state["ema_state_dict"][key], value) for key, value in state[raw].items())


def train_and_go_on(stage, folder, *words, **options):
    """Trains in `folder`/straight, and on from step 2 of 4 in another folder: the two ends are the same to the bit."""
    options = flags(*TINY, *words, save_every=2, log_every=1, **options)
    straight, resumed = folder / "straight", folder / "resumed"
    succeed(f"train_{stage}.py", *options, output_dir=straight)
    source = straight / f"{stage}_checkpoint_step_2.pt"
    succeed(f"train_{stage}.py", *options, resume_from_checkpoint=source, output_dir=resumed)
    assert_same_run(resumed / f"{stage}_final.pt", straight / f"{stage}_final.pt")
    return straight


@STAGES
def test_a_run_with_muon_resumes_bit_identically(runs, tmp_path, stage):
    """Its optimizers are in the checkpoint. AdamW cannot go on from them, nor Muon from AdamW's."""
    options = [*options_of(stage, runs), "--optimizer", "muon"]
    options += flags(lr=1e-3) if stage == "teacher" else flags(dfake_gen_update_ratio=2, gan_classifier=True)
    folder = train_and_go_on(stage, tmp_path, *options)
    state, name = load(folder / f"{stage}_final.pt"), f"{stage}_checkpoint_step_2.pt"
    optimizers = [key for key in state if key.startswith("optimizer_") and "gan" not in key]
    assert len(optimizers) == 1 + (stage == "dmd2")
    assert all(sum("momentum" in moments for moments in state[key]["state"].values()) > 10 for key in optimizers)
    told = f"its {optimizers[0]} does not fit; resume it with the options of its run"
    for source, optimizer in ((folder / name, "adamw"), (runs / stage / name, "muon")):
        resume = dict(optimizer=optimizer, resume_from_checkpoint=source, output_dir=tmp_path / "mixed")
        refuses(told, f"train_{stage}.py", *TINY, *options, **resume)


@STAGES
def test_a_resume_takes_the_options_of_its_run(runs, tmp_path, stage):
    """All but the device and W&B's. Weights and metrics are those of the run that never stopped, to the bit."""
    moved = tmp_path / stage
    shutil.copytree(runs / stage, moved)
    source = moved / f"{stage}_checkpoint_step_2.pt"
    state = load(source)
    state["config"] |= {"wandb": True, "wandb_key": "a stranger's", "wandb_dir": "/theirs"}  # not theirs to choose
    checkpoint.save(source, state)
    resume = dict(resume_from_checkpoint=source, device="cpu", wandb_run_name="für alle")
    told = succeed(f"train_{stage}.py", cwd=tmp_path, **resume)
    assert f"going on from {source} at step 2" in told
    assert "--lr_warmup_steps 500 is more than the run's 4 steps" in told
    lines = [re.findall(r"\w*loss\w*", line) for line in told.splitlines() if line.startswith("step ")]
    columns = {"teacher": 1, "dmd2": 4}[stage]  # which keep their places
    assert len(lines) == 2 and lines[0] == lines[1] and len(lines[0]) == columns
    ours, theirs = (load(final(folder, stage))["config"] for folder in (tmp_path, runs))
    changed = {"wandb_run_name": "für alle", "output_dir": str(moved), "resume_from_checkpoint": str(source)}
    assert ours == theirs | changed
    assert "wandb_run_name: für alle" in (moved / "config.yaml").read_text(encoding="utf-8")
    assert_same_run(final(tmp_path, stage), final(runs, stage))
    ours, theirs = ([row | {"images_per_second": 0} for row in metrics(folder / stage)] for folder in (tmp_path, runs))
    assert ours == theirs


@pytest.mark.parametrize("what", ["missing", "text", "truncated", "bit flip", "foreign", "hostile"])
def test_unfit_checkpoints_are_refused(runs, tmp_path, what):
    file, trace = tmp_path / "bad.pt", tmp_path / "it-ran"
    good = final(runs, "teacher").read_bytes()
    half = len(good) // 2
    if what == "text":
        file.write_text("no checkpoint")
    elif what == "truncated":
        file.write_bytes(good[:half])
    elif what == "bit flip":
        file.write_bytes(good[:half] + bytes([good[half] ^ 1]) + good[half + 1 :])
    elif what == "foreign":
        torch.save({"weights": torch.zeros(3)}, file)
    elif what == "hostile":
        file.write_bytes(hostile_bytes(f"touch {trace}"))
    for script, flag in (("generate.py", "--checkpoint"), ("train_dmd2.py", "--teacher_checkpoint")):
        assert_refused(run_script(script, flag, file, output_dir=tmp_path / "out"), f"checkpoint {file}")
    assert not trace.exists() and not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused(runs, tmp_path, monkeypatch):
    """Checkpoints of another kind, network, run or set of classes, and what is missing; nothing is written.

    Options that a resume takes are checked together with the given ones; values in a checkpoint are not trusted.
    """
    monkeypatch.chdir(tmp_path)
    teacher, student, out = final(runs, "teacher"), final(runs, "dmd2"), tmp_path / "out"
    dmd2 = ["train_dmd2.py", *TINY, "--output_dir", out]
    digits = dict(teacher_checkpoint=teacher)
    refuses("--teacher_checkpoint ./log/checkpoints/teacher/teacher_final.pt: there is no such file; train", *dmd2)
    refuses("a generator; give a teacher's checkpoint", *dmd2, teacher_checkpoint=student)
    refuses("not of a training by train_dmd2.py", *dmd2, resume_from_checkpoint=teacher, **digits)
    refuses("the options: sigma_min 5.0, sigma_max 1.0: the networks know", *dmd2, sigma_min=5, sigma_max=1, **digits)
    refuses("student_sigmas 1.0 5.0: must descend, starting with", *dmd2, student_sigmas=[1, 5], **digits)
    heads = dict(gan_classifier=True, **digits)
    refuses("gan_resolutions 16: the encoder has 8, 4", *dmd2, gan_resolutions=[16, 4], **heads)
    heads |= dict(gan_resolutions=[8, 4], resume_from_checkpoint=student)  # which has one head
    refuses("does not fit; resume it with the options of its run", *dmd2, **heads)
    write_images(tmp_path / "set", each=8, size=8)
    data = dict(dataset="folder", data_dir=tmp_path / "set")
    refuses("knows 10 classes; the data set folder has 2", *dmd2, **digits, **data)

    train = ["train_teacher.py", *TINY, "--output_dir", out]
    refuses("its model_config differs from this run's", *train, img_resolution=16, resume_from_checkpoint=teacher)
    refuses("no checkpoints in", *train, *TINY_NET, resume_from_checkpoint="latest")
    refuses("--batch_size 17 is more than the 16 images", *train, batch_size=17, **data)
    if not torch.cuda.is_available():
        refuses("--device cuda: this machine has 0 CUDA devices", *train, device="cuda")
    resume = ["train_teacher.py", "--output_dir", out, "--resume_from_checkpoint"]
    refuses("--batch_size 16 must be divisible by --grad_accum 3", *resume, teacher, grad_accum=3)
    state, bad, theirs = load(teacher), tmp_path / "bad.pt", tmp_path / "theirs"
    for key in ("guidance_cls_state_dict", "guidance_fake_unet_state_dict"):
        checkpoint.save(bad, {name: value for name, value in load(student).items() if name != key})
        refuses(f"its {key} does not fit; resume it with the options", *dmd2, resume_from_checkpoint=bad)
    for change, told in (
        ({"lr": "fast"}, f"checkpoint {bad}: lr needs a number, not 'fast'"),
        ({"lr": 1e-4, "dataset": "cifar10", "data_dir": str(theirs)}, "which is not here: give --data_dir"),
    ):
        state["config"] |= change
        checkpoint.save(bad, state)
        refuses(told, *resume, bad)
    assert not theirs.exists()
    assert not out.exists()


OBJECTIVES = {
    "sid": dict(objective="sid", conditioning_sigma=2.5, min_step_percent=0, max_step_percent=0.8),
    "sid with heads": dict(objective="sid", gan_classifier=True, gan_features="fake", gan_resolutions=[8, 4]),
    "few steps": dict(student_sigmas=[80, 5], schedule="flow", shift=2),
    "heads with an optimizer of their own": dict(gan_classifier=True, gan_lr=1e-3, clip_guidance=False),
    "f-divergence": dict(f_divergence="js", gan_classifier=True, gan_features="teacher", gan_resolutions=[8, 4]),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_train_and_go_on(runs, tmp_path, name):
    options = OBJECTIVES[name] | dict(dfake_gen_update_ratio=1)
    straight = train_and_go_on("dmd2", tmp_path, *options_of("dmd2", runs), **options)
    for row in metrics(straight):
        assert np.isfinite(row["loss_dm"]) and ("gen_cls_loss" in row) == ("gan_classifier" in OBJECTIVES[name])


def test_options_without_effect_are_named(runs, tmp_path):
    options = flags(*TINY, *options_of("dmd2", runs), gan_lr=1e-3, sid_alpha=1.2, rho=5)
    told = succeed("train_dmd2.py", *options, output_dir=tmp_path / "a")
    assert "without effect beside the other options: --sid_alpha, --gan_lr\n" in told
    told = succeed("train_dmd2.py", config=runs / "dmd2" / "config.yaml", output_dir=tmp_path / "b")  # has all options
    assert "without effect" not in told


def test_a_student_of_several_steps_is_sampled_at_its_levels(runs, tmp_path):
    """Every script finds them in the checkpoint; a resume that asks for others is refused."""
    options, folder = [*TINY, *options_of("dmd2", runs)], tmp_path / "run"
    succeed("train_dmd2.py", *options, student_sigmas=[80, 2.5], save_every=2, output_dir=folder)
    student = folder / "dmd2_final.pt"
    assert load(student)["student_sigmas"] == [80, 2.5]
    data = dict(features="classifier", num_samples=20, data_dir=tmp_path, device="cpu", batch_size=7)
    succeed("evaluate.py", checkpoint=student, **data)
    assert json.loads((folder / "evaluation.json").read_text())["rows"][1]["evaluations"] == 2
    told = succeed("generate.py", checkpoint=student, output_dir=tmp_path / "images", num_samples=2, device="cpu")
    assert "network evaluations per image: 2;" in told
    options += flags(student_sigmas=[80, 5, 1], resume_from_checkpoint=folder / "dmd2_checkpoint_step_2.pt")
    told = "its student_sigmas differs from this run's, [80.0, 5.0, 1.0]"
    refuses(told, "train_dmd2.py", *options, output_dir=tmp_path / "other")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_steps_of_a_student_take_turns(runs, tmp_path, optimizer):
    """The first one's fake_unet is trained at step 0, the second one's up to the next generator turn, and so on."""
    options = dict(student_sigmas=[80, 5, 1], dfake_gen_update_ratio=2, optimizer=optimizer, save_every=1, keep_last=9)
    succeed("train_dmd2.py", *TINY, *options_of("dmd2", runs), **options, output_dir=tmp_path)
    start, trained = load(final(runs, "teacher"))["ema_state_dict"]["conv_in.weight"], []
    for step in (1, 2, 3, 4):
        fakes = load(tmp_path / f"dmd2_checkpoint_step_{step}.pt")["guidance_fake_unet_state_dict"]
        trained.append([not torch.equal(fakes[f"{index}.conv_in.weight"], start) for index in range(3)])
    assert trained == [[True, False, False], [True, True, False], [True, True, False], [True, True, True]]


# ---- without classes ------------------------------------------------------------------------------------------------


@STAGES
def test_both_stages_without_classes(unconditional, tmp_path, stage):
    """And a resumed run is bit-identical to one that never stopped."""
    folder = unconditional / stage
    state = load(final(unconditional, stage))
    assert state["model_config"]["label_dim"] == 0 and state["class_names"] == [] and state["step"] == 4
    assert not any("embed_class" in name for name in state["ema_state_dict"])
    assert all(np.isfinite(value) for row in metrics(folder) for value in row.values())
    grid = Image.open(unconditional / "dmd2" / "samples" / "step_0000004.png")
    assert grid.size == (8 * (2 * 90 + 8), 8 * 98)  # 8x8 of the teacher's beside 8x8 of the student's
    source = folder / f"{stage}_checkpoint_step_2.pt"
    options = dict(config=folder / "config.yaml", resume_from_checkpoint=source, output_dir=tmp_path / stage)
    succeed(f"train_{stage}.py", **options)
    assert_same_run(final(tmp_path, stage), final(unconditional, stage))


def test_labels_are_left_out_where_there_are_some(unconditional, tmp_path):
    """With --label_dim 0, images with labels make the same teacher. It is distilled with them, without a GAN."""
    data = flags(*TINY, dataset="folder", data_dir=write_zip(tmp_path / "set.zip", labels=[0, 1] * 20, size=8))
    told = succeed("train_teacher.py", *TINY_NET, *data, label_dim=0, output_dir=tmp_path / "teacher")
    assert "40 images, no classes" in told
    ours, theirs = (load(final(folder, "teacher"))["ema_state_dict"] for folder in (tmp_path, unconditional))
    assert_same(dict(ours), dict(theirs))
    succeed("train_dmd2.py", *data, *options_of("dmd2", tmp_path), output_dir=tmp_path / "dmd2")
    assert load(final(tmp_path, "dmd2"))["class_names"] == []


def test_a_teacher_is_distilled_without_its_data(runs, tmp_path):
    """By SiD, from labels alone. Heads and the yardstick ask for real images."""
    options = [*options_of("dmd2", runs), *flags(dataset="none", objective="sid", dfake_gen_update_ratio=1)]
    straight = train_and_go_on("dmd2", tmp_path, *options)
    assert all(np.isfinite(row["loss_dm"]) and "real_std" not in row for row in metrics(straight))
    assert load(straight / "dmd2_final.pt")["class_names"] == [str(digit) for digit in range(10)]
    refuses("--dataset none: --gan_classifier needs", "train_dmd2.py", *options, gan_classifier=True)
    refuses("does not say what real images", "evaluate.py", checkpoint=straight / "dmd2_final.pt", features="pixels")


# ---- Weights & Biases, data sets, notebooks -------------------------------------------------------------------------


def test_weights_and_biases_offline_holds_scalars_images_and_checkpoints(runs, tmp_path):
    """The real package, offline, by the README's flags: all of it is in the run's folder, and the key is not."""
    pytest.importorskip("wandb")
    options = dict(wandb=True, wandb_mode="offline", wandb_project="minimal-dmd", wandb_run_name="dmd2-mnist")
    options |= dict(wandb_dir=tmp_path / "wandb", wandb_log_every=2, wandb_log_images=True, wandb_log_samples=True)
    options |= dict(wandb_sample_every=2, wandb_log_checkpoints=True, log_every=1, save_every=2, wandb_key="x" * 40)
    options |= dict(output_dir=tmp_path / "out", env={"HOME": str(tmp_path / "home")})
    succeed("train_dmd2.py", *TINY, *options_of("dmd2", runs), **options)
    assert list((tmp_path / "wandb" / "artifacts" / "staging").iterdir())  # copies, to be sent by `wandb sync`
    assert not list((tmp_path / "home").rglob("artifacts"))
    assert "wandb_key" not in load(tmp_path / "out" / "dmd2_final.pt")["config"]

    (run_file,) = (tmp_path / "wandb").glob("wandb/offline-run-*/*.wandb")
    written = run_file.read_bytes()  # wandb's record of the run; names and texts stand in it as they are
    artifact = run_file.stem.removeprefix("run-") + "-checkpoint"
    for name in ("dmd2-mnist", "minimal-dmd", "loss_dm", "guidance_grad_norm", artifact, "generator_lr"):
        assert name.encode() in written, name
    assert b"x" * 40 not in written
    for kind in ("images", "samples"):
        assert len(list(run_file.parent.glob(f"files/media/images/{kind}_*.png"))) == 2


def test_without_wandb_it_is_not_imported(tmp_path):
    (tmp_path / "wandb.py").write_text("raise SystemExit('wandb was imported')")
    succeed("train_teacher.py", *TINY, *TINY_NET, output_dir=tmp_path / "out", env={"PYTHONPATH": str(tmp_path)})


def test_gradient_accumulation_takes_the_same_steps(tmp_path):
    """A batch in four parts against one: loss and gradient agree."""
    for parts in (1, 4):
        options = flags(log_every=1, dropout=0, grad_accum=parts, output_dir=tmp_path / str(parts))
        assert train_teacher.main([*TINY, *TINY_NET, *options]) == 0
    for whole, accumulated in zip(metrics(tmp_path / "1"), metrics(tmp_path / "4"), strict=True):
        for name in ("loss", "grad_norm"):
            assert whole[name] == pytest.approx(accumulated[name], rel=1e-4)


def test_cifar10_from_torchvisions_files(tmp_path, monkeypatch):
    """The default data set through all scripts: an archive as torchvision expects it, without checksums."""
    base, lists = tmp_path / "cifar-10-batches-py", [[name, None] for name, _ in CIFAR10.train_list]
    base.mkdir()
    for name, _ in lists:
        pixels = np.random.default_rng(0).integers(0, 256, (10, 3072), dtype=np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": pixels, "labels": [*range(10)]}))
    (base / "test_batch").write_bytes(b"torchvision wants it to be there")
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr(CIFAR10, "train_list", lists)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})

    data = dict(data_dir=tmp_path, batch_size=8, step_number=2, device="cpu")
    small = dict(model_channels=8, num_blocks=1, output_dir=tmp_path / "teacher")
    assert train_teacher.main(flags(**data, **small)) == 0
    assert train_dmd2.main(flags(*options_of("dmd2", tmp_path), **data, output_dir=tmp_path / "dmd2")) == 0
    state = load(final(tmp_path, "dmd2"))
    assert state["class_names"] == names and state["model_config"]["img_channels"] == 3
    assert "ema_state_dict" not in state and "guidance_cls_state_dict" not in state
    succeed("generate.py", checkpoint=final(tmp_path, "dmd2"), output_dir=tmp_path / "images", num_samples=2)
    assert (tmp_path / "images" / "airplane_samples.png").exists()


RUN = [page for page in PAGES if page.stem not in ("objectives", "teachers")]  # whose commands need other teachers


@pytest.mark.parametrize("group", ["python", "torchrun", "pretrained"])
def test_readme_commands_run_in_order(group, runs, tmp_path, inception_weights):
    """The README's commands and those of some pages, each on what the ones before wrote; scaled down by flags."""
    for name in ("teacher", "dmd2"):
        shutil.copytree(runs / name, tmp_path / "log" / "checkpoints" / name)
    for path in [ROOT / "configs", *ROOT.glob("config_*.yaml")]:
        (tmp_path / path.name).symlink_to(path)
    write_edm(tmp_path / "edm-cifar10-32x32-cond-vp.pkl")
    write_zip(tmp_path / "cifar10.zip", labels=[*range(10)] * 10, size=8)
    (tmp_path / "my_images").mkdir()  # of which `small` makes digits
    small = {
        "train_teacher.py": [*TINY, *TINY_NET, *flags(save_every=2)],
        "train_dmd2.py": [*TINY, *flags(save_every=2)],
        "evaluate.py": flags(num_samples=40, features="classifier", steps=2, device="cpu"),
        "generate.py": flags(num_samples=2),
        "toy.py": flags(step_number=5, batch_size=32),
    }
    for runner, script, *arguments in [command for page in RUN for command in commands(page)]:
        script = re.sub(r"^extras\.(\w+)$", r"extras/\1.py", script)
        if script == "extras/gpu_check.py":  # its test runs it
            continue
        edm, on_two_cores = ("edm_cifar10" in " ".join(arguments), "cifar_cpu" in " ".join(arguments))
        pretrained = script in ("import_teacher.py", "export.py") or script.startswith("extras/") or edm
        if group != ("pretrained" if pretrained else "torchrun" if on_two_cores else runner):
            continue
        if "--wandb" in arguments:
            arguments += flags(wandb_mode="offline")
        arguments = [re.sub(r"step_\d+\.pt", "step_2.pt", argument) for argument in arguments]
        if script.startswith("train") and "--resume_from_checkpoint" not in arguments:
            arguments += flags(overwrite=True)  # the same run is given by flags, by YAML, and with W&B
        if "--fid_reference" in arguments:  # this needs Inception's features: here with random weights and few images
            np.savez(tmp_path / "cifar10-32x32.npz", mu=np.zeros(2048), sigma=np.eye(2048))
            write_images(tmp_path / "set", classes=[str(digit) for digit in range(10)], each=2, size=8)
            arguments += flags(num_samples=4, inception_weights=inception_weights, dataset="folder", data_dir="set")
        else:
            arguments += small.get(script, [])
        if script == "train_dmd2.py" and edm:
            arguments += flags(dataset="folder", data_dir="cifar10.zip")  # that teacher knows no digits
        if {"configs/train1_gan.yaml", "configs/cifar_cpu1.yaml"} & {*arguments}:
            arguments += flags(gan_resolutions=8)  # these networks have no feature maps at 32 and 16
        if runner == "torchrun" and script.startswith("train"):
            arguments += flags(grad_accum=1)
        done = (torchrun if runner == "torchrun" else run_script)(script, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    evaluated = "log/checkpoints/cifar_cpu_dmd2/evaluation.json"
    assert (tmp_path / {"python": "generated", "torchrun": evaluated, "pretrained": "generator.onnx"}[group]).exists()


@pytest.mark.slow
def test_teacher_learns_real_digits(tmp_path):
    """Half a minute on mnist5k: an untrained network has a loss near 2.0, 150 steps must bring it below 0.6."""
    options = dict(config=ROOT / "configs" / "mnist0.yaml", step_number=150, lr_decay=0, log_every=10, device="cpu")
    succeed("train_teacher.py", **options, output_dir=tmp_path, sample_every=1000)
    rows = metrics(tmp_path)
    assert rows[0]["loss"] > 1.2 and np.mean([row["loss"] for row in rows[-3:]]) < 0.6


def test_load_network_in_a_notebook(tmp_path):
    """Two lines give images, at the levels that the checkpoint names, in a notebook and by generate.py."""
    net = tiny_unet()
    state = {"feedforward_model_state_dict": net.state_dict(), "step": 1, "model_config": net.config, "config": {}}
    for name, sigmas in (("one", [3.0]), ("two", [80.0, 3.0])):
        checkpoint.save(tmp_path / f"{name}.pt", state | {"student_sigmas": sigmas})
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    images = load_sampler(tmp_path / "one.pt")(noise, labels)
    loaded = checkpoint.load_network(tmp_path / "one.pt")
    torch.testing.assert_close(images, one_step_sampler(loaded, noise, labels, 3.0))
    assert not torch.allclose(images, one_step_sampler(net, noise, labels, 80.0), atol=0.01)
    assert json.dumps(loaded.config)
    two_steps = load_sampler(tmp_path / "two.pt")
    images = two_steps(noise, labels)
    torch.testing.assert_close(images, student_sampler(net, noise, labels, [80.0, 3.0]))
    torch.testing.assert_close(images, two_steps(noise, labels))  # independent of torch's own random numbers
    succeed("generate.py", checkpoint=tmp_path / "one.pt", output_dir=tmp_path, num_samples=1, format="npz")
    expected = to_uint8(one_step_sampler(net, *class_noise(range(10), 1, (1, 8, 8), 0), 3.0)).int()
    made = torch.from_numpy(np.load(tmp_path / "samples.npz")["images"]).permute(0, 3, 1, 2).int()
    assert (made - expected).abs().max() <= 1
