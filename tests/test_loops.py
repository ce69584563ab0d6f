"""The two training loops against the same steps written out by hand, and what they pass on."""

import re

import pytest
import torch
from conftest import ROOT, flags, metrics, refuses, tiny_unet, write_images

import checkpoint
import guidance
import train_dmd2
import train_teacher
from data import Batches, load_dataset
from guidance import GuidanceModel
from model import SimpleUNet
from run import read_metrics
from unified_model import UnifiedModel

NET = dict(img_resolution=8, model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], dropout=0.0)
RUN = dict(batch_size=16, step_number=4, log_every=1, device="cpu")


def adamw(parameters, lr, betas=(0.9, 0.999)):
    return torch.optim.AdamW(parameters, lr, betas=betas, weight_decay=0.01)


def step(optimizer, lr, most):
    """One step with gradients of at most the norm `most`. Returns the norm before that."""
    parameters = optimizer.param_groups[0]["params"]
    norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad *= min(1.0, most / norm.item())
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


def average(ema, net, decay):
    for old, new in zip(ema.values(), net.parameters(), strict=True):
        old.copy_(decay * old + (1 - decay) * new.detach())


def weights(network):
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def assert_close(stored, expected, start):
    """The weights moved from `start` to where they are expected, within 1% of the way: Adam magnifies rounding."""
    flat = [torch.cat([weights[name].flatten() for name in expected]) for weights in (stored, expected, start)]
    assert (flat[0] - flat[1]).norm() < 0.01 * (flat[1] - flat[2]).norm()


FACTORS = [1 / 3, 2 / 3, 1.0, 0.5]  # of the learning rate: three steps of warm-up; the last half of four falls to zero


@pytest.mark.parametrize("name", ["mnist5k", "folder"])
def test_the_teachers_loop_is_edms(tmp_path, name):
    """Four steps: noise levels, loss, labels, rate, clipping, average. By default photos are mirrored, digits not."""
    data_dir = tmp_path if name == "mnist5k" else write_images(tmp_path / "set", size=8)
    options = dict(lr=1e-2, lr_warmup_steps=3, lr_decay=0.5, ema_decay=0.15, P_mean=-0.5, P_std=0.7, clip_grad_norm=0.1)
    options |= dict(seed=3, dataset=name, data_dir=data_dir, output_dir=tmp_path / "run")
    assert train_teacher.main(flags(**NET, **options, **RUN)) == 0

    dataset = load_dataset(name, data_dir, 8, None, "cpu")
    batches = Batches(dataset, 16, seed=3, hflip=name == "folder")
    torch.manual_seed(3)
    net = SimpleUNet(**NET, img_channels=dataset.images.shape[1], label_dim=len(dataset.class_names))
    net.to(memory_format=torch.channels_last)
    start, ema, optimizer, rows = weights(net), weights(net), adamw(net.parameters(), 1e-2), metrics(tmp_path / "run")
    for number in range(4):
        images, labels = next(batches)
        sigma = (-0.5 + 0.7 * torch.randn(16)).exp()[:, None, None, None]
        noisy = images + sigma * torch.randn_like(images)
        loss = ((sigma**-2 + 0.5**-2) * (net(noisy, sigma.flatten(), labels) - images) ** 2).mean()
        loss.backward()
        norm = step(optimizer, 1e-2 * FACTORS[number], most=0.1)
        average(ema, net, min(0.15, (number + 1) / (number + 11)))
        assert rows[number]["loss"] == pytest.approx(loss.item(), rel=1e-3)
        assert rows[number]["grad_norm"] == pytest.approx(norm, rel=1e-3) and norm > 0.1
        assert rows[number]["lr"] == pytest.approx(1e-2 * FACTORS[number])
    state = checkpoint.load(tmp_path / "run" / "teacher_final.pt")
    assert_close(state["model_state_dict"], weights(net), start)
    assert_close(state["ema_state_dict"], ema, start)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The checkpoint of a teacher with random weights, whose images depend on their labels."""
    folder = tmp_path_factory.mktemp("loops")
    options = RUN | dict(dataset="mnist5k", data_dir=folder, output_dir=folder, step_number=1)
    assert train_teacher.main(flags(**NET, **options)) == 0
    net = tiny_unet(dropout=0.0, attn_resolutions=[4])
    path = folder / "teacher_final.pt"
    checkpoint.save(path, checkpoint.load(path) | {"ema_state_dict": net.state_dict(), "model_config": net.config})
    return path


@pytest.mark.parametrize("gan_lr, clip", [(None, True), (4e-3, True), (4e-3, False)])
def test_the_students_loop_is_dmd2s(teacher, tmp_path, gan_lr, clip):
    """Four iterations at ratio 2, in two parts per batch; all rates and weights differ."""
    options = dict(generator_lr=1e-2, guidance_lr=5e-3, lr_warmup_steps=3, lr_decay=0.5, ema_decay=[0.4, 0.1], seed=5)
    options |= dict(dfake_gen_update_ratio=2, grad_accum=2, clip_grad_norm=0.02, clip_guidance=clip)
    options |= dict(gan_classifier=True, gen_cls_loss_weight=0.3, cls_loss_weight=0.7)
    options |= dict(teacher_checkpoint=teacher, conditioning_sigma=4.0, max_step_percent=0.7)
    options |= dict(dataset="mnist5k", data_dir=tmp_path, output_dir=tmp_path / "run")
    options |= {"gan_lr": gan_lr} if gan_lr else {}
    assert train_dmd2.main(flags(**options, **RUN)) == 0

    batches = Batches(load_dataset("mnist5k", tmp_path, 8, 1, "cpu"), 16, seed=5)
    torch.manual_seed(5)
    net = checkpoint.load_network(teacher)
    model = GuidanceModel(net, gan_classifier=True, max_step_percent=0.7, sigma_data=net.sigma_data)
    fake_unet, heads, model = model.fake_unet, model.cls_pred_branch, UnifiedModel(model, conditioning_sigma=4.0).eval()
    generator = model.feedforward_model
    start, first_heads = weights(generator), weights(heads)
    averages = {decay: weights(generator) for decay in (0.4, 0.1)}
    generators = adamw(generator.parameters(), 1e-2)
    guidances = [adamw(fake_unet.parameters(), 5e-3), adamw(heads.parameters(), gan_lr or 5e-3, betas=(0.5, 0.99))]
    for number, factor in enumerate(FACTORS):
        real, labels = next(batches)
        noise, fakes = torch.randn_like(real), []
        for z, y in zip(noise.chunk(2), labels.chunk(2), strict=True):
            if number % 2 == 0:
                losses, _, fake = model.generator_turn(z, y)
                ((losses["loss_dm"] + 0.3 * losses["gen_cls_loss"]) / 2).backward()
            else:
                fake = model.generate(z, y).detach()
            fakes.append(fake)
        if number % 2 == 0:
            assert step(generators, 1e-2 * factor, most=0.02) > 0.02
            for decay, ema in averages.items():
                average(ema, generator, min(decay, (number // 2 + 1) / (number // 2 + 3)))
        for fake, y, x in zip(fakes, labels.chunk(2), real.chunk(2), strict=True):
            losses, _ = model.guidance_turn(fake, y, x, y)
            ((losses["loss_fake_mean"] + 0.7 * losses["guidance_cls_loss"]) / 2).backward()
        for optimizer, lr in zip(guidances, (5e-3, gan_lr or 5e-3), strict=True):
            step(optimizer, lr * factor, most=0.02 if clip else 1e9)
    state = checkpoint.load(tmp_path / "run" / "dmd2_final.pt")
    assert_close(state["feedforward_model_state_dict"], weights(generator), start)
    assert_close(state["guidance_fake_unet_state_dict"], weights(fake_unet), start)
    assert_close(state["guidance_cls_state_dict"], weights(heads), first_heads)
    assert_close(state["ema_state_dict"], averages[0.4], start)
    assert_close(state["ema_0.1_state_dict"], averages[0.1], start)


def test_the_generator_may_start_as_another_network(teacher, tmp_path):
    """With its weights, while `fake_unet` has the teacher's. A resumed run goes on with both."""
    state, other = checkpoint.load(teacher), tiny_unet(model_channels=16)
    file = tmp_path / "other.pt"
    checkpoint.save(file, state | {"ema_state_dict": other.state_dict(), "model_config": other.config})
    options = RUN | dict(dataset="mnist5k", teacher_checkpoint=teacher, generator_checkpoint=file)
    options |= dict(output_dir=tmp_path / "run", generator_lr=1e-9, guidance_lr=1e-9)
    assert train_dmd2.main(flags(**options, ema_decay=0.5)) == 0
    drawn = {name: torch.randn_like(tensor) for name, tensor in other.state_dict().items()}
    checkpoint.save(file, checkpoint.load(file) | {"ema_state_dict": drawn})  # the run goes on with its own weights
    assert train_dmd2.main(flags(**options | dict(step_number=6), resume_from_checkpoint="latest")) == 0
    state = checkpoint.load(tmp_path / "run" / "dmd2_final.pt")
    assert state["step"] == 6 and state["model_config"] == other.config
    own, theirs = other.state_dict(), checkpoint.load(teacher)["ema_state_dict"]
    for name, start in (("feedforward_model", own), ("ema", own), ("guidance_fake_unet", theirs)):
        torch.testing.assert_close(state[f"{name}_state_dict"], dict(start), rtol=1e-4, atol=1e-6)

    for changes, told in (
        ({"model_config": other.config | {"img_resolution": 16}}, "its img_resolution is 16, the teacher's 8"),
        ({"model_config": other.config | {"label_dim": 9}, "class_names": []}, "its label_dim is 9, the teacher's 10"),
    ):
        checkpoint.save(file, checkpoint.load(file) | changes)
        refuses(f"--generator_checkpoint {file}: {told}", "train_dmd2.py", **options, overwrite=True)
        checkpoint.save(file, checkpoint.load(file) | {"model_config": other.config})
    options |= dict(generator_checkpoint=tmp_path / "no.pt", overwrite=True)
    refuses(f"--generator_checkpoint {tmp_path}/no.pt: there is no", "train_dmd2.py", **options)


def test_the_quickstart_trains_with_dmd2s_gradient_and_its_gan(teacher, tmp_path, monkeypatch):
    (config,) = re.findall(r"train_dmd2.py --config (\S+)", (ROOT / "quickstart.sh").read_text())
    calls, loss = [], guidance.dmd_loss
    monkeypatch.setattr(guidance, "dmd_loss", lambda *given: calls.append(given) or loss(*given))
    options = dict(config=ROOT / config, optimizer="adamw", step_number=6, log_every=1, batch_size=16, device="cpu")
    assert train_dmd2.main(flags(**options, teacher_checkpoint=teacher, output_dir=tmp_path)) == 0
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert len(calls) == sum("loss_dm" in row for row in rows) == 2  # ratio 5
    assert all("guidance_cls_loss" in row for row in rows) and "gen_cls_loss" in rows[0]


def test_options_reach_the_guidance_model(teacher, tmp_path, monkeypatch):
    options = dict(f_divergence="kl", gan_features="teacher", gan_resolutions=[8, 4], num_train_timesteps=500)
    options |= dict(gan_classifier=True, objective="sid", sid_alpha=1.2, schedule="flow", shift=3.0)
    options |= dict(min_step_percent=0.1, max_step_percent=0.6, sigma_min=0.01, sigma_max=50.0, rho=5.0)
    seen = {}
    monkeypatch.setattr(train_dmd2, "GuidanceModel", lambda *_, **given: seen.update(given) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_dmd2.main(flags(**RUN, **options, teacher_checkpoint=teacher, output_dir=tmp_path / "run"))
    assert {name: seen[name] for name in options} == options


def test_a_flow_matching_teacher_is_distilled_as_one(tmp_path, monkeypatch):
    """t is logit-normal by default; the checkpoint says what it predicts; both learn with its loss."""
    seen, loss = [], guidance.denoising_loss
    for module in (train_teacher, guidance):
        monkeypatch.setattr(module, "denoising_loss", lambda *given: seen.append(given[3:]) or loss(*given))
    options = RUN | dict(dataset="mnist5k", output_dir=tmp_path / "teacher", step_number=1)
    assert train_teacher.main(flags(**options, **NET, prediction="flow")) == 0
    file = tmp_path / "teacher" / "teacher_final.pt"
    assert {name: checkpoint.load(file)["config"][name] for name in ("P_mean", "P_std")} == dict(P_mean=0.0, P_std=1.0)
    assert train_dmd2.main(flags(**options | dict(output_dir=tmp_path / "run"), teacher_checkpoint=file)) == 0
    assert seen == [(0.5, "flow")] * 2
    assert checkpoint.load_network(tmp_path / "run" / "dmd2_final.pt").prediction == "flow"


@pytest.mark.parametrize("error, told", [(0.9, False), (1.1, True), (float("nan"), True)])
def test_a_misread_teacher_is_told(teacher, tmp_path, monkeypatch, capsys, error, told):
    monkeypatch.setattr(train_dmd2, "relative_errors", lambda *_, **__: {0.1: 0.5, 1.0: error})
    options = RUN | dict(dataset="mnist5k", teacher_checkpoint=teacher, output_dir=tmp_path / "run", step_number=1)
    assert train_dmd2.main(flags(**options)) == 0
    assert ("at sigma 1.0 it denoises worse" in capsys.readouterr().out) == told


@pytest.mark.parametrize("hflip", [True, False])
def test_real_images_are_mirrored_if_the_teachers_were(teacher, tmp_path, monkeypatch, hflip):
    """Or the GAN's heads would learn that mirrored means generated."""
    state = checkpoint.load(teacher)
    checkpoint.save(tmp_path / "teacher.pt", state | {"config": state["config"] | {"hflip": hflip}})
    seen = {}
    monkeypatch.setattr(train_dmd2, "Batches", lambda *_, **given: seen.update(given) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        options = RUN | dict(dataset="mnist5k", teacher_checkpoint=tmp_path / "teacher.pt", output_dir=tmp_path / "run")
        train_dmd2.main(flags(**options))
    assert seen == {"hflip": hflip}
