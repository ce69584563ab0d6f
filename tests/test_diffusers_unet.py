"""Folders of diffusers' UNet2DModel as teachers. Each test makes its own, small and random."""

import importlib.util
import json
import math
import sys
from itertools import pairwise

import pytest
import torch
from conftest import needs_muon, run_script, succeed, write_images
from edm_files import assert_import_refused, imported
from test_options import assert_refused

import checkpoint
from guidance import GuidanceModel
from import_teacher import load
from model import denoising_loss
from networks.diffusers_unet import DiffusersUNet, noise_levels
from sampling import heun_sampler
from support.optimizers import Muon
from support.script import UserError

MISSING = [name for name in ("diffusers", "safetensors") if not importlib.util.find_spec(name)]
needs_diffusers = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}, not installed")

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
    from diffusers import DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    model = UNet2DModel(**{"sample_size": 8, **UNET, **changes}).eval()
    model.save_pretrained(folder / "unet")
    DDPMScheduler(**(scheduler or {})).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    if card:
        (folder / "README.md").write_text(card)
    return folder, model


def schedulers_sigmas(scheduler):
    bars = scheduler.alphas_cumprod
    return ((1 - bars) / bars).sqrt()


@needs_diffusers
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("classes", [None, 5])
def test_denoises_as_the_model_predicts(tmp_path, classes, prediction_type):
    """Against diffusers' forward pass and the scheduler's sums, at whole levels t; the encoder alone."""
    from diffusers import DDPMScheduler

    folder, model = write_folder(tmp_path / "a", dict(prediction_type=prediction_type), num_class_embeds=classes)
    net = checkpoint.load_network(imported(folder, tmp_path))
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
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
        sigma = schedulers_sigmas(scheduler)[t]
        denoised = net(noisy / bar.sqrt(), sigma, labels)
        torch.testing.assert_close(denoised, expected, rtol=0, atol=1e-4 * max(1.0, sigma.item()))
    both, maps = net(noisy, 1.0, labels, features=[4, 8])
    assert net.feature_channels == {8: 16, 4: 32} and [m.shape for m in maps] == [(2, 32, 4, 4), (2, 16, 8, 8)]
    torch.testing.assert_close(net(noisy, 1.0, labels), both)
    torch.testing.assert_close(net.encode(noisy, 1.0, labels, [4, 8]), maps)
    if classes:
        torch.testing.assert_close(net(noisy, 1.0, torch.nn.functional.one_hot(labels, classes)), both)


@needs_diffusers
def test_encoder_alone_does_not_run_the_decoder(tmp_path, monkeypatch):
    folder, _ = write_folder(tmp_path / "a")
    net = checkpoint.load_network(imported(folder, tmp_path))
    monkeypatch.setattr(net.unet.mid_block, "forward", None)
    assert net.encode(torch.randn(1, 3, 8, 8), 1.0, None, [4])[0].shape == (1, 32, 4, 4)


@needs_diffusers
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddim_is_eulers_method(tmp_path, beta_schedule, prediction_type):
    """diffusers' DDIM without noise or clipping is Euler's method along dx/dsigma at its levels.

    With y = x_t / a_t DDIM's step is y' = y + (sigma' - sigma) eps, with eps = (y - D) / sigma.
    """
    from diffusers import DDIMScheduler

    options = dict(beta_schedule=beta_schedule, prediction_type=prediction_type)
    folder, model = write_folder(tmp_path / "a", options, num_class_embeds=3)
    net = checkpoint.load_network(imported(folder, tmp_path))
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler", clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    x, labels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 2])
    sigmas = [*schedulers_sigmas(scheduler)[scheduler.timesteps].tolist(), 0.0]
    y = x.double() * (1 + sigmas[0] ** 2) ** 0.5  # up to 20,000, where float32 has no room for an image
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t, class_labels=labels).sample, t, x).prev_sample
        for sigma, sigma_next in pairwise(sigmas):
            y = y + (sigma_next - sigma) * (y - net(y.float(), sigma, labels)) / sigma
    torch.testing.assert_close(y.float(), x, rtol=0, atol=2e-5 * x.abs().max().item())


@pytest.mark.parametrize("trained", [False, True])
def test_levels_are_those_of_the_betas(trained):
    """sigma^2 = 1 / prod(1 - beta) - 1, by hand; levels that do not rise and unknown schedules are refused."""
    betas = [0.1, 0.2, 0.3]
    schedule = dict(num_train_timesteps=3, beta_schedule="linear", beta_start=0.1, beta_end=0.3)
    if trained:
        schedule |= dict(trained_betas=betas, beta_end=0.9)
    expected = [(1 / math.prod(1 - beta for beta in betas[: n + 1]) - 1) ** 0.5 for n in range(3)]
    torch.testing.assert_close(noise_levels(**schedule), torch.tensor(expected, dtype=torch.float64))
    for wrong in (
        dict(beta_start=-0.1),
        dict(beta_end=1.0),
        dict(num_train_timesteps=400_000_000),
        dict(beta_schedule="sigmoid"),
    ):
        with pytest.raises(ValueError, match=r"do not rise|400000000: 2 to 100000 are|beta_schedule 'sigmoid'"):
            noise_levels(**{**LINEAR, **wrong})


@needs_diffusers
def test_timestep_between_levels_and_beyond():
    """Half way in ln(sigma) is half way in t; outside, t stays at the ends, which bound samplers and guidance."""
    net = DiffusersUNet(8, 3, 0, UNET, "epsilon", LINEAR)
    sigmas = noise_levels(**LINEAR)
    middle = (sigmas[1:] * sigmas[:-1]).sqrt().float()
    torch.testing.assert_close(net.timestep(middle), torch.arange(999) + 0.5, rtol=0, atol=5e-3)
    torch.testing.assert_close(net.timestep(sigmas.float()), torch.arange(1000.0), rtol=0, atol=5e-3)
    assert net.timestep(torch.tensor([0.0, 1e-3, 1e6])).tolist() == [0, 0, 999]
    assert (net.sigma_min, net.sigma_max) == pytest.approx((0.01, 157.4), rel=1e-3)
    levels = GuidanceModel(net, sigma_max=300.0).karras_sigmas
    assert levels[0].item() == pytest.approx(net.sigma_min) and levels[-1].item() == pytest.approx(net.sigma_max)


@needs_diffusers
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_denoising_loss_is_that_of_the_prediction(prediction_type):
    """The weight makes it the plain squared error of eps or of v, as in the network's own training."""
    torch.manual_seed(0)
    net = DiffusersUNet(8, 3, 0, UNET, prediction_type, LINEAR).eval()
    images, noise, sigma = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.tensor([0.02, 0.5, 3.0, 50.0])
    scale = (1 + sigma**2).sqrt()[:, None, None, None]
    noisy = images + sigma[:, None, None, None] * noise
    predicted = net.unet(noisy / scale, net.timestep(sigma)).sample
    target = noise if prediction_type == "epsilon" else (noise - sigma[:, None, None, None] * images) / scale
    loss = denoising_loss(net(noisy, sigma), images, sigma, net.sigma_data)
    torch.testing.assert_close(loss, ((predicted - target) ** 2).mean(), rtol=1e-4, atol=0)


@needs_diffusers
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


@needs_diffusers
def test_imported_and_distilled_by_command_line(tmp_path):
    """One line names the network; both turns with GAN train; the generator loads and samples finite images."""
    card = "---\ntags:\n- diffusers\nlicense: apache-2.0\n---\n# A model\nlicense: none\n"
    folder, _ = write_folder(tmp_path / "a", card=card, num_class_embeds=2)
    teacher = tmp_path / "teacher.pt"
    out = succeed("import_teacher.py", "--source", folder, "--output", teacher)
    assert "found DiffusersUNet, 0.2 M parameters, 8x8, 2 classes, licence: apache-2.0" in out
    images = write_images(tmp_path / "images", size=8)
    arguments = (
        f"--teacher_checkpoint {teacher} --dataset folder --data_dir {images} --batch_size 4 --device cpu".split()
    )
    run = ["--step_number", 2, "--dfake_gen_update_ratio", 1, "--output_dir", tmp_path / "run"]
    succeed("train_dmd2.py", *arguments, *run, "--gan_classifier", "--gan_resolutions", 8, 4)
    generator = tmp_path / "run" / "dmd2_final.pt"
    net = checkpoint.load_network(generator)
    assert isinstance(net, DiffusersUNet)
    assert heun_sampler(net, torch.randn(2, 3, 8, 8), torch.tensor([0, 1]), num_steps=3).isfinite().all()
    succeed("generate.py", "--checkpoint", generator, "--output_dir", tmp_path / "out", "--num_samples", 1)
    for option, values in (("--conditioning_sigma", ["200.0"]), ("--student_sigmas", ["80", "0.001"])):
        done = run_script("train_dmd2.py", *arguments, option, *values, "--output_dir", tmp_path / "other")
        assert_refused(done, f"{option} {values[-1]}: the teacher knows noise from 0.01 to 157.4")


@needs_diffusers
def test_older_folders(tmp_path):
    """No subfolders, the attention's former names, no prediction_type, a head for all channels; no classes."""
    from safetensors.torch import load_file, save_file

    folder, model = write_folder(tmp_path / "a", attention_head_dim=None)
    old = tmp_path / "old"
    old.mkdir()
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    for now, then in former.items():
        tensors = {name.replace(now, then): tensor for name, tensor in tensors.items()}
    assert any("proj_attn" in name for name in tensors)
    save_file(tensors, old / "diffusion_pytorch_model.safetensors")
    (old / "config.json").write_text((folder / "unet" / "config.json").read_text())
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    del scheduler["prediction_type"], scheduler["trained_betas"]
    (old / "scheduler_config.json").write_text(json.dumps(scheduler))
    state = checkpoint.load(imported(old, tmp_path))
    assert state["class_names"] == [] and state["config"]["licence"] is None
    net, x = checkpoint.network(state, "x.pt"), torch.randn(2, 3, 8, 8)
    sigma = net.sigma_max
    expected = x - sigma * model(x / (1 + sigma**2) ** 0.5, 999).sample
    torch.testing.assert_close(net(x, sigma), expected.detach(), rtol=0, atol=1e-3)


@needs_diffusers
def test_averaged_weights_of_the_training_script(tmp_path):
    """`checkpoint-500/{unet, unet_ema}` with the scheduler beside it: the average is taken, and a line says so."""
    from diffusers import UNet2DModel
    from diffusers.training_utils import EMAModel

    folder, model = write_folder(tmp_path / "run")
    inside = folder / "checkpoint-500"
    inside.mkdir()
    (folder / "unet").rename(inside / "unet")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    EMAModel(model.parameters(), model_cls=UNet2DModel, model_config=model.config).save_pretrained(inside / "unet_ema")
    found = load(inside)
    assert torch.equal(found.state["unet.conv_in.weight"], model.conv_in.weight)
    assert found.notes == ["its `unet_ema` was taken, the averaged weights", f"its scheduler is {folder / 'scheduler'}"]


@needs_diffusers
@pytest.mark.parametrize("options", [{}, dict(variant="fp16"), dict(max_shard_size="100KB")], ids=str)
def test_variants_and_shards(tmp_path, options):
    folder, model = write_folder(tmp_path / "a")
    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole.unlink()
    model.save_pretrained(folder / "unet", **options)
    assert whole.exists() == (not options)
    found = load(folder)
    assert torch.equal(found.state["unet.conv_in.weight"], model.conv_in.weight)
    assert found.notes == ["its weights are those of the variant fp16"] * ("variant" in options)


@needs_diffusers
def test_null_class(tmp_path):
    """Of K + 1 classes the last may be the null class of guidance: K names make the others the classes."""
    folder, model = write_folder(tmp_path / "a", num_class_embeds=3)
    assert (
        "3 classes; if the last is a null class of guidance, name the others with --class_names" in load(folder).notes
    )
    net = checkpoint.load_network(output := imported(folder, tmp_path, "--class_names", "cat,dog"))
    assert net.label_dim == 2 and checkpoint.load(output)["class_names"] == ["cat", "dog"]
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 0])
    expected = x - net.sigma_max * model(x / (1 + net.sigma_max**2) ** 0.5, 999, class_labels=labels).sample
    torch.testing.assert_close(net(x, net.sigma_max, labels), expected.detach(), rtol=0, atol=1e-3)
    assert torch.equal(net.unet.class_embedding.weight[2], model.class_embedding.weight[2])
    with pytest.raises(UserError, match="--class_names has 4 different names; the network has 3 classes"):
        imported(folder, tmp_path / "other", "--class_names", "a,b,c,d")


def change(file, **entries):
    def apply(folder):
        path = folder / file
        content = {**json.loads(path.read_text()), **entries}
        path.write_text(json.dumps({name: value for name, value in content.items() if value != "gone"}))

    return apply


def only_bin(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"PK")


def cut_short(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def two_variants(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.with_suffix(".fp16.safetensors").write_bytes(path.read_bytes())
    path.rename(path.with_suffix(".non_ema.safetensors"))


UNET_JSON, SCHEDULER_JSON = "unet/config.json", "scheduler/scheduler_config.json"
WRONG = {  # change of the folder, part of the one-line message
    "pickle": (only_bin, "no diffusion_pytorch_model.safetensors"),
    "weights cut short": (cut_short, "damaged, or not safetensors"),
    "no scheduler": (lambda folder: (folder / SCHEDULER_JSON).unlink(), "scheduler_config.json: No such file"),
    "no JSON": (lambda folder: (folder / UNET_JSON).write_text("[1"), "config.json is damaged"),
    "latents": (
        change("model_index.json", vqvae=["diffusers", "VQModel"]),
        "a pipeline with vqvae; only UNet2DModel on pixels",
    ),
    "other network": (
        change(UNET_JSON, _class_name="DiTTransformer2DModel"),
        "the network is a 'DiTTransformer2DModel'",
    ),
    "other argument": (change(UNET_JSON, speed=3), "unexpected keyword argument 'speed'"),
    "other widths": (change(UNET_JSON, block_out_channels=[16, 64]), "has shape [32], not [64]"),
    "a block more": (change(UNET_JSON, layers_per_block=2), "no tensor "),
    "a block less": (change(UNET_JSON, mid_block_type=None), "does not belong to UNet2DModel"),
    "skip blocks": (
        change(UNET_JSON, down_block_types=["SkipDownBlock2D", "DownBlock2D"]),
        "blocks of type 'SkipDownBlock2D'",
    ),
    "fourier": (change(UNET_JSON, time_embedding_type="fourier"), "time embedding is not positional"),
    "variances": (change(UNET_JSON, out_channels=6), "out_channels 6 with in_channels 3: predicted variances"),
    "not square": (change(UNET_JSON, sample_size=[8, 16]), "sample_size [8, 16]"),
    "no size": (change(UNET_JSON, sample_size="gone"), "no 'sample_size'"),
    "flow matching": (
        change(SCHEDULER_JSON, beta_schedule="gone", _class_name="FlowMatch"),
        "'FlowMatch', has no beta_schedule",
    ),
    "no signal": (change(SCHEDULER_JSON, rescale_betas_zero_snr=True), "rescale_betas_zero_snr is not supported"),
    "other prediction": (change(SCHEDULER_JSON, prediction_type="flow"), "prediction_type 'flow'"),
    "many blocks": (change(UNET_JSON, layers_per_block=10**9), "layers_per_block 1000000000: sides of at most 1024"),
    "large images": (change(UNET_JSON, sample_size=8192), "8192 pixels, layers_per_block 1: sides of at most 1024"),
    "two variants": (two_variants, "variants fp16, non_ema of the weights; rename one"),
    "levels that fall": (change(SCHEDULER_JSON, trained_betas=[-0.5] * 1000), "noise levels do not rise"),
}


@needs_diffusers
@pytest.mark.parametrize("what", WRONG)
def test_other_folders_are_refused(tmp_path, what):
    folder, _ = write_folder(tmp_path / "a")
    spoil, message = WRONG[what]
    spoil(folder)
    assert_import_refused(folder, tmp_path, message)


@needs_diffusers
def test_without_diffusers_one_line_says_so(tmp_path, monkeypatch):
    folder, _ = write_folder(tmp_path / "a")
    path = imported(folder, tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"^checkpoint .*: this network needs .* pip install diffusers$"):
        checkpoint.load_network(path)
    assert_import_refused(folder, tmp_path / "again", "pip install diffusers")


@needs_diffusers
@needs_muon
def test_muon_knows_the_blocks():
    net = DiffusersUNet(8, 3, 0, UNET, "epsilon", LINEAR)
    hidden = {id(p) for p in Muon(net, 1e-3).hidden}
    names = {name for name, p in net.named_parameters() if id(p) in hidden}
    inside = ("unet.down_blocks", "unet.mid_block", "unet.up_blocks")
    assert names == {name for name, p in net.named_parameters() if name.startswith(inside) and p.dim() > 1}
