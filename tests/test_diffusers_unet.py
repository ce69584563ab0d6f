"""Folders of diffusers' UNet2DModel as teachers. Each test makes its own, small and random."""

import json
import math
import os
import sys
from functools import partial

import pytest
import torch
from conftest import refuses, succeed, write_images
from edm_files import assert_import_refused, imported

import checkpoint
from guidance import GuidanceModel
from import_teacher import load
from importers.diffusers import FLOW
from networks.diffusers_unet import DiffusersUNet, noise_levels
from sampling import euler_sampler, heun_sampler
from support.optimizers import Muon
from support.script import UserError

diffusers, safetensors = pytest.importorskip("diffusers"), pytest.importorskip("safetensors.torch")

UNET = dict(
    block_out_channels=(16, 32),
    layers_per_block=1,
    norm_num_groups=8,
    attention_head_dim=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
LINEAR = dict(num_train_timesteps=1000, beta_schedule="linear", beta_start=1e-4, beta_end=0.02)


def write_folder(folder, scheduler=None, card=None, **changes):
    """A random UNet2DModel, saved with its scheduler as diffusers saves a pipeline; returns (folder, model)."""
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(**{"sample_size": 8, **UNET, **changes}).eval()
    diffusers.DDPMPipeline(model, diffusers.DDPMScheduler(**(scheduler or {}))).save_pretrained(folder)
    if card:
        (folder / "README.md").write_text(card)
    return folder, model


@pytest.mark.parametrize(
    "prediction_type, beta_schedule",
    [("epsilon", "linear"), ("v_prediction", "squaredcos_cap_v2"), ("sample", "scaled_linear")],
)
@pytest.mark.parametrize("classes", [None, 5])
def test_denoises_as_the_model_predicts(tmp_path, monkeypatch, classes, prediction_type, beta_schedule):
    """Against diffusers' forward pass and the scheduler's sums, at whole levels t; the encoder alone."""
    options = dict(prediction_type=prediction_type, beta_schedule=beta_schedule)
    folder, model = write_folder(tmp_path / "a", options, num_class_embeds=classes)
    net = checkpoint.load_network(imported(folder, tmp_path))
    scheduler = diffusers.DDPMScheduler.from_pretrained(folder / "scheduler")
    images, noise = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    labels = torch.tensor([4, 1]) if classes else None
    for t in (0, 1, 300, 998, 999):
        noisy = scheduler.add_noise(images, noise, torch.tensor([t, t]))
        predicted = model(noisy, t, class_labels=labels).sample.detach()
        bar = scheduler.alphas_cumprod[t]
        expected = {  # x0 by the definition of each: noisy = a x0 + s eps, v = a eps - s x0
            "epsilon": (noisy - (1 - bar).sqrt() * predicted) / bar.sqrt(),
            "v_prediction": bar.sqrt() * noisy - (1 - bar).sqrt() * predicted,
            "sample": predicted,
        }[prediction_type]
        sigma = ((1 - bar) / bar).sqrt()
        denoised = net(noisy / bar.sqrt(), sigma, labels)
        torch.testing.assert_close(denoised, expected, rtol=0, atol=1e-4 * max(1.0, sigma.item()))
    both, maps = net(noisy, 1.0, labels, features=[4, 8])
    assert net.feature_channels == {8: 16, 4: 32} and [m.shape for m in maps] == [(2, 32, 4, 4), (2, 16, 8, 8)]
    torch.testing.assert_close(net(noisy, 1.0, labels), both)
    if classes:
        torch.testing.assert_close(net(noisy, 1.0, torch.nn.functional.one_hot(labels, classes)), both)
    monkeypatch.setattr(net.unet.mid_block, "forward", None)  # the encoder alone does not run the decoder
    torch.testing.assert_close(net.encode(noisy, 1.0, labels, [4, 8]), maps)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_samples_as_diffusers_does(tmp_path, shift):
    """Against FlowMatchEulerDiscreteScheduler at the same t, even but for its shift: x_t' = x_t + (t' - t) v."""
    folder, model = write_folder(tmp_path / "a", num_class_embeds=3)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.save_pretrained(folder / "scheduler")
    net = checkpoint.load_network(imported(folder, tmp_path))
    assert net.sigma_min == pytest.approx(0.001 / 0.999) and net.shift == shift
    z, labels, end = torch.randn(2, 3, 8, 8), torch.tensor([0, 2]), 80 / (shift + 80)
    scheduler.set_timesteps(sigmas=torch.linspace(end, 0, 11)[:-1].tolist())  # before the shift
    assert scheduler.sigmas[0].item() == pytest.approx(80 / 81)
    x = 80 / 81 * z  # x_t of the noise that our sampler starts from
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t, class_labels=labels).sample, t, x).prev_sample
    torch.testing.assert_close(euler_sampler(net, z, labels, num_steps=10), x, rtol=0, atol=2e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_levels_are_those_of_the_betas(trained):
    """sigma^2 = 1 / prod(1 - beta) - 1, by hand; levels that do not rise and unknown schedules are refused."""
    betas = [0.1, 0.2, 0.3]
    schedule = dict(num_train_timesteps=3, beta_schedule="linear", beta_start=0.1, beta_end=0.9 if trained else 0.3)
    expected = [(1 / math.prod(1 - beta for beta in betas[: n + 1]) - 1) ** 0.5 for n in range(3)]
    levels = noise_levels(**schedule, trained_betas=betas if trained else None)
    torch.testing.assert_close(levels.float(), torch.tensor(expected))
    for name, wrong in dict(beta_start=-0.1, beta_end=1.0, num_train_timesteps=4 * 10**8, beta_schedule="none").items():
        with pytest.raises((ValueError, NotImplementedError), match=r"do not rise|2 to 100000 are|none is not"):
            noise_levels(**{**LINEAR, name: wrong})


def test_timestep_between_levels_and_beyond():
    """Half way in ln(sigma) is half way in t; outside, t stays at the ends, which bound samplers and guidance."""
    net = DiffusersUNet(8, 3, 0, UNET, "epsilon", LINEAR)
    sigmas = noise_levels(**LINEAR)
    middle = (sigmas[1:] * sigmas[:-1]).sqrt().float()
    torch.testing.assert_close(net.timestep(middle), torch.arange(999) + 0.5, rtol=0, atol=5e-3)
    torch.testing.assert_close(net.timestep(sigmas.float()), torch.arange(1000.0), rtol=0, atol=5e-3)
    assert net.timestep(torch.tensor([0.0, 1e-3, 1e6])).tolist() == [0, 0, 999]
    assert (net.sigma_min, net.sigma_max) == pytest.approx((0.01, 157.4), rel=1e-3)
    levels = GuidanceModel(net, sigma_max=300.0).sigmas
    assert levels[0].item() == pytest.approx(net.sigma_min) and levels[-1].item() == pytest.approx(net.sigma_max)


def test_what_bf16_rounds_is_not_multiplied_by_sigma(tmp_path):
    """Under autocast epsilon is float32: rounded to bfloat16, it would change pixels by a tenth or more at sigma 80."""
    folder, _ = write_folder(tmp_path / "a", num_class_embeds=10)
    state = checkpoint.load(imported(folder, tmp_path))
    assert state["class_names"][3] == "3"  # ten classes, but nothing says that they are CIFAR-10's
    net, x, labels = checkpoint.network(state, "x.pt"), 80 * torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        denoised = net(x, 80.0, labels)
    epsilon = (x - denoised) / 80
    rounded = epsilon.bfloat16().float()
    assert denoised.dtype == torch.float32 and (epsilon - rounded).abs().max() > 1e-4


def test_imported_and_distilled_by_command_line(tmp_path):
    """One line names the network; both turns with GAN train; the generator loads and samples finite images."""
    card = "---\ntags:\n- diffusers\nlicense: apache-2.0\n---\n# A model\nlicense: none\n"
    folder, _ = write_folder(tmp_path / "a", card=card, num_class_embeds=2)
    teacher = tmp_path / "teacher.pt"
    out = succeed("import_teacher.py", "--source", folder, "--output", teacher)
    assert "found DiffusersUNet, 0.2 M parameters, 8x8, 2 classes, licence: apache-2.0" in out
    images = write_images(tmp_path / "images", size=8)
    options = dict(teacher_checkpoint=teacher, dataset="folder", data_dir=images, batch_size=4, device="cpu")
    run = dict(step_number=2, dfake_gen_update_ratio=1, gan_classifier=True, gan_resolutions=[8, 4])
    succeed("train_dmd2.py", **options, **run, output_dir=tmp_path / "run")
    generator = tmp_path / "run" / "dmd2_final.pt"
    net = checkpoint.load_network(generator)
    assert isinstance(net, DiffusersUNet)
    assert heun_sampler(net, torch.randn(2, 3, 8, 8), torch.tensor([0, 1]), num_steps=3).isfinite().all()
    succeed("generate.py", "--checkpoint", generator, "--output_dir", tmp_path / "out", "--num_samples", 1)
    for option, values in (("conditioning_sigma", [200.0]), ("student_sigmas", [80.0, 0.001])):
        told = f"--{option} {values[-1]}: the network knows noise from 0.01 to 157.4"
        refuses(told, "train_dmd2.py", **options, **{option: values}, output_dir=tmp_path / "other")


def test_older_folders(tmp_path):
    """No subfolders, the attention's former names, no prediction_type, a head for all channels; no classes."""
    folder, model = write_folder(tmp_path / "a", attention_head_dim=None)
    old = folder / "unet"
    tensors = safetensors.load_file(old / "diffusion_pytorch_model.safetensors")
    for now, then in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        assert any(now in name for name in tensors)
        tensors = {name.replace(now, then): tensor for name, tensor in tensors.items()}
    safetensors.save_file(tensors, old / "diffusion_pytorch_model.safetensors")
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    del scheduler["prediction_type"], scheduler["trained_betas"]
    (old / "scheduler_config.json").write_text(json.dumps(scheduler))
    state = checkpoint.load(imported(old, tmp_path))
    assert state["class_names"] == [] and state["config"]["licence"] is None
    net, x = checkpoint.network(state, "x.pt"), torch.randn(2, 3, 8, 8)
    sigma = net.sigma_max
    expected = x - sigma * model(x / (1 + sigma**2) ** 0.5, 999).sample
    torch.testing.assert_close(net(x, sigma), expected.detach(), rtol=0, atol=1e-3)


def test_averaged_weights_of_the_training_script(tmp_path):
    """`checkpoint-500/{unet, unet_ema}` with the scheduler beside it: the average is taken, and a line says so."""
    from diffusers.training_utils import EMAModel

    folder, model = write_folder(tmp_path / "run")
    inside = folder / "checkpoint-500"
    inside.mkdir()
    (folder / "unet").rename(inside / "unet")
    for parameter in model.parameters():
        parameter.data.mul_(2)
    average = EMAModel(model.parameters(), model_cls=diffusers.UNet2DModel, model_config=model.config)
    average.save_pretrained(inside / "unet_ema")
    found = load(inside)
    assert torch.equal(found.state["unet.conv_in.weight"], model.conv_in.weight)
    weights = inside / "unet_ema" / "diffusion_pytorch_model.safetensors"
    assert found.notes == [f"its weights are {weights}, its scheduler is in {folder / 'scheduler'}"]


def change(file, **entries):
    """A function that changes entries of a JSON file in a folder; "gone" removes one."""

    def apply(folder):
        content = {**json.loads((folder / file).read_text()), **entries}
        (folder / file).write_text(json.dumps({name: value for name, value in content.items() if value != "gone"}))

    return apply


unet, scheduler = partial(change, "unet/config.json"), partial(change, "scheduler/scheduler_config.json")
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
WRONG = {  # part of the one-line message -> change of the folder
    "no diffusion_pytorch_model.safetensors, but config.json, diffusion_pytorch_model.bin in": lambda folder: os.rename(
        folder / WEIGHTS, folder / WEIGHTS.replace(".safetensors", ".bin")
    ),
    "damaged, or not a network": lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100]),
    "scheduler_config.json: No such file": lambda folder: (folder / "scheduler/scheduler_config.json").unlink(),
    "config.json is damaged": lambda folder: (folder / "unet/config.json").write_text("[1"),
    "a pipeline with vqvae; only UNet2DModel on pixels": change("model_index.json", vqvae=["diffusers", "VQModel"]),
    "the network is a 'DiTTransformer2DModel'": unet(_class_name="DiTTransformer2DModel"),
    "unexpected keyword argument 'speed'": unet(speed=3),
    "has shape [32], not [64]": unet(block_out_channels=[16, 64]),
    "no tensor ": unet(layers_per_block=2),
    "does not belong to DiffusersUNet": unet(mid_block_type=None),
    "blocks of type 'SkipDownBlock2D'": unet(down_block_types=["SkipDownBlock2D", "DownBlock2D"]),
    "time embedding is not positional": unet(time_embedding_type="fourier"),
    "sample_size 8, in_channels 3, out_channels 6: images must": unet(out_channels=6),
    "sample_size [8, 16], in_channels 3": unet(sample_size=[8, 16]),
    "KeyError: 'sample_size'": unet(sample_size="gone"),
    "'FlowMatch', has no beta_schedule": scheduler(beta_schedule="gone", _class_name="FlowMatch"),
    "with prediction_type 'epsilon': not a velocity": scheduler(_class_name=FLOW, prediction_type="epsilon"),
    "use_dynamic_shifting or invert_sigmas is not supported": scheduler(
        _class_name=FLOW, prediction_type="v_prediction", use_dynamic_shifting=True
    ),
    "step by step from above 0 to below infinity": scheduler(rescale_betas_zero_snr=True),
    "prediction_type 'flow' needs": scheduler(prediction_type="flow"),
    "noise levels do not rise": scheduler(trained_betas=[-0.5] * 1000),
    "layers_per_block 1000000000: sides of at most 1024": unet(layers_per_block=10**9),
    "8192 pixels, layers_per_block 1: sides of at most 1024": unet(sample_size=8192),
}


@pytest.mark.parametrize("message", WRONG)
def test_other_folders_are_refused(tmp_path, message):
    folder, _ = write_folder(tmp_path / "a")
    WRONG[message](folder)
    assert_import_refused(folder, tmp_path, message)


def test_without_diffusers_one_line_says_so(tmp_path, monkeypatch):
    folder, _ = write_folder(tmp_path / "a")
    path = imported(folder, tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"^checkpoint .*: this network needs .* pip install diffusers$"):
        checkpoint.load_network(path)
    assert_import_refused(folder, tmp_path / "again", "pip install diffusers")


def test_muon_knows_the_blocks():
    net = DiffusersUNet(8, 3, 0, UNET, "epsilon", LINEAR)
    hidden = {id(p) for p in Muon(net, 1e-3).hidden}
    names = {name for name, p in net.named_parameters() if id(p) in hidden}
    inside = ("unet.down_blocks", "unet.mid_block", "unet.up_blocks")
    assert names == {name for name, p in net.named_parameters() if name.startswith(inside) and p.dim() > 1}
