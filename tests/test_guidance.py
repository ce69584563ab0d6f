import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import GaussianDenoiser, tiny_unet

from guidance import GuidanceModel
from model import Denoiser
from objectives import dmd_loss, sid_loss
from sampling import few_step_sampler
from unified_model import UnifiedModel

LABELS = torch.tensor([0, 1, 2, 3])


def gaussian_guidance(real=(0.5, 0.4), fake=(-0.3, 0.8)):
    guidance = GuidanceModel(GaussianDenoiser(*real))
    guidance.fake_unet = GaussianDenoiser(*fake)
    return guidance


def test_distribution_matching_gradient_is_the_one_on_paper():
    """Both denoisers in closed form: D(x_t) = (s^2 x_t + sigma^2 m) / (s^2 + sigma^2), in float64, written out here."""
    (m1, s1), (m2, s2) = (0.5, 0.4), (-0.3, 0.8)
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64).requires_grad_()
    noise, sigma = torch.randn_like(x), torch.tensor([0.01, 0.4, 3.0, 60.0], dtype=torch.float64)
    losses, _ = gaussian_guidance().compute_distribution_matching_loss(x, LABELS, sigma, noise)
    losses["loss_dm"].backward()

    s = sigma.reshape(4, 1, 1, 1)
    x_t = x.detach() + s * noise
    real = (s1**2 * x_t + s**2 * m1) / (s1**2 + s**2)
    fake = (s2**2 * x_t + s**2 * m2) / (s2**2 + s**2)
    grad = torch.stack([(fake[i] - real[i]) / (x[i].detach() - real[i]).abs().mean() for i in range(4)])
    torch.testing.assert_close(x.grad, grad / x.numel(), rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(losses["loss_dm"].item(), 0.5 * grad.square().mean().item(), rtol=1e-5, atol=0)


def test_noise_levels_are_ascending_and_drawn_from_their_range(monkeypatch):
    guidance = GuidanceModel(
        GaussianDenoiser(0.0, 1.0), num_train_timesteps=200, min_step_percent=0.29, max_step_percent=0.5
    )
    sigmas = guidance.karras_sigmas
    assert sigmas.shape == (200,) and (sigmas.diff() > 0).all()
    torch.testing.assert_close(sigmas[[0, -1]], torch.tensor([0.002, 80.0]))
    assert (guidance.min_step, guidance.max_step) == (58, 100)
    drawn = guidance.add_noise(torch.zeros(5000, 1, 1, 1), None, None, guidance.min_step, guidance.max_step)[1]
    assert drawn.min() == sigmas[58] and drawn.max() == sigmas[100]
    drawn = guidance.add_noise(torch.zeros(5000, 1, 1, 1), None, None)[1]
    assert drawn.min() == sigmas[0] and drawn.max() == sigmas[-1]

    monkeypatch.setattr(torch, "randn_like", torch.ones_like)  # on zeros the noised image is the noise level
    labels = torch.zeros(5000, dtype=torch.long)
    for guidance.objective in ("dmd", "sid"):
        _, log = guidance.compute_distribution_matching_loss(torch.zeros(5000, 1, 1, 1), labels)
        assert log["dmtrain_noisy"].min() == sigmas[58] and log["dmtrain_noisy"].max() == sigmas[100]
    guidance.fake_unet.forward = lambda x, sigma, labels: (seen.append(sigma), x)[1]
    seen = []
    guidance.compute_loss_fake(torch.zeros(5000, 1, 1, 1), labels)
    assert seen[0].min() == sigmas[0] and seen[0].max() == sigmas[-1]

    top = GuidanceModel(GaussianDenoiser(0.0, 1.0), min_step_percent=0.9996, max_step_percent=1.0)
    assert (top.min_step, top.max_step) == (999, 999)


def test_the_schedule_keeps_to_the_teachers_noise_levels():
    teacher = GaussianDenoiser(0.0, 1.0)
    teacher.sigma_min, teacher.sigma_max = 0.01, 14.6
    assert GuidanceModel(teacher, sigma_min=0.002).karras_sigmas[[0, -1]].tolist() == pytest.approx([0.01, 14.6])
    with pytest.raises(ValueError, match="the teacher knows none of these noise levels"):
        GuidanceModel(teacher, sigma_min=20, sigma_max=80)


@pytest.mark.parametrize(
    "options, told",
    [
        (dict(objective="sdi"), "objective must be dmd or sid"),
        (dict(gan_classifier=True, gan_resolutions=[5]), "gan_resolutions 5: the teacher's encoder has 8, 4"),
        (dict(f_divergence="lk"), "f_divergence must be one of rkl"),
        (dict(f_divergence="kl"), "needs gan_classifier"),
        (dict(f_divergence="kl", gan_classifier=True, objective="sid"), "needs objective dmd"),
        (dict(f_divergence="kl", gan_classifier=True, diffusion_gan=False), "heads that see noised images"),
        (dict(f_divergence="kl", gan_classifier=True, diffusion_gan_max_timestep=500), "they see only 500"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        GuidanceModel(tiny_unet(), **options)


@pytest.mark.parametrize("weighting", ["edm", "none"])
def test_fake_loss_is_weighted_error(weighting):
    """A denoiser that is off by exactly e has the loss mean of (sigma^-2 + sigma_data^-2) e^2, or of e^2."""
    guidance = GuidanceModel(GaussianDenoiser(0.0, 1.0), sigma_data=0.4, fake_loss_weighting=weighting)
    x, sigma = torch.rand(4, 1, 6, 6, requires_grad=True), torch.tensor([0.1, 0.5, 2.0, 50.0])
    guidance.fake_unet.forward = lambda x_t, sigma, labels: x.detach() + 0.1 * sigma.reshape(-1, 1, 1, 1)
    losses, _ = guidance.compute_loss_fake(x, LABELS, sigma, torch.zeros_like(x))
    weight = sigma**-2 + 0.4**-2 if weighting == "edm" else 1
    torch.testing.assert_close(losses["loss_fake_mean"], (weight * (0.1 * sigma) ** 2).mean())
    assert not losses["loss_fake_mean"].requires_grad


def test_backward_simulation_gives_a_step_what_the_steps_before_made():
    """Step 2 of 3: two passes without gradient, then one with it, from the same noises as `few_step_sampler` takes."""
    model, calls = UnifiedModel(GuidanceModel(tiny_unet()), student_sigmas=[3.0, 1.0, 0.3]), []
    forward = model.feedforward_model.forward

    def told(x, sigma, labels):
        calls.append((round(sigma[0].item(), 4), torch.is_grad_enabled()))
        return forward(x, sigma, labels)

    model.feedforward_model.forward = told
    z = torch.randn(4, 1, 8, 8)
    torch.manual_seed(1)
    images = model.generate_at(z, LABELS, student_step=2)
    assert calls == [(3.0, False), (1.0, False), (0.3, True)]
    torch.manual_seed(1)
    torch.testing.assert_close(images, few_step_sampler(model.feedforward_model, z, LABELS, [3.0, 1.0, 0.3]))
    images.sum().backward()
    assert len(grads(model.feedforward_model)) == len(list(model.feedforward_model.parameters()))
    torch.testing.assert_close(
        model.generate_at(z, LABELS), few_step_sampler(model.feedforward_model, z, LABELS, [3.0])
    )


def test_each_step_of_a_student_has_its_own_fake_unet():
    model = UnifiedModel(GuidanceModel(tiny_unet()), student_sigmas=[3.0, 1.0])
    assert [net is model.guidance_model.fake_unet for net in model.fake_unets] == [True, False]
    losses, _ = model.guidance_turn(torch.randn(4, 1, 8, 8), LABELS, student_step=1)
    losses["loss_fake_mean"].backward()
    assert not grads(model.fake_unets[0]) and grads(model.fake_unets[1])
    with torch.no_grad():
        model.fake_unets[1].conv_out.weight += 1
    noise = torch.randn(4, 1, 8, 8)
    assert (
        model.generator_turn(noise, LABELS, 0)[0]["loss_dm"] == 0 < model.generator_turn(noise, LABELS, 1)[0]["loss_dm"]
    )


class AffineGenerator(torch.nn.Module):
    """G(z) = mean + std z, for noise that comes scaled by the conditioning sigma."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = (torch.nn.Parameter(torch.tensor(value)) for value in (mean, std))

    def forward(self, x, sigma, labels):
        return self.mean + self.std * x / sigma.reshape(-1, 1, 1, 1)


def test_generator_moves_to_the_data():
    """With the exact fake denoiser at every step, DMD2 carries a Gaussian generator to the teacher's."""
    torch.manual_seed(0)
    model = UnifiedModel(gaussian_guidance(real=(0.5, 0.3)))
    model.feedforward_model = generator = AffineGenerator(-0.5, 0.8)
    optimizer = torch.optim.Adam(generator.parameters(), lr=0.02)
    labels = torch.zeros(64, dtype=torch.long)
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 600)
        model.fake_unets[0] = GaussianDenoiser(generator.mean.item(), generator.std.item())
        losses, _, _ = model.generator_turn(torch.randn(64, 1, 4, 4), labels)
        optimizer.zero_grad()
        losses["loss_dm"].backward()
        optimizer.step()
    assert abs(generator.mean.item() - 0.5) < 0.02 and abs(abs(generator.std.item()) - 0.3) < 0.02


def unet_model(**options):
    model = UnifiedModel(GuidanceModel(tiny_unet(), **options))
    for parameter in model.guidance_model.fake_unet.parameters():  # a fake_unet unlike the teacher
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def grads(module):
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


def test_teacher_is_frozen_and_fake_and_generator_start_as_its_copies():
    teacher = tiny_unet(dropout=0.5)
    model = UnifiedModel(GuidanceModel(teacher)).train()
    assert (
        model.guidance_model.real_unet is teacher and not teacher.training and model.guidance_model.fake_unet.training
    )
    assert not any(p.requires_grad for p in teacher.parameters())
    for network in (model.feedforward_model, model.guidance_model.fake_unet):
        assert all(p.requires_grad for p in network.parameters())
        for ours, theirs in zip(network.parameters(), teacher.parameters(), strict=True):
            assert torch.equal(ours, theirs) and ours is not theirs


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gan_classifier": True},
        {"objective": "sid"},
        {"objective": "sid", "gan_classifier": True, "gan_features": "teacher", "gan_resolutions": [8, 4]},
        {"f_divergence": "js", "gan_classifier": True, "gan_resolutions": [4, 8]},
    ],
    ids=str,
)
def test_each_turn_leaves_the_other_side_alone(options):
    model, gan = unet_model(**options), options.get("gan_classifier", False)
    guidance, noise = model.guidance_model, torch.randn(4, 1, 8, 8)
    before = copy.deepcopy(model.state_dict())

    losses, _, images = model.generator_turn(noise, LABELS)
    sum(losses.values()).backward()
    assert len(grads(model.feedforward_model)) == len(list(model.feedforward_model.parameters()))
    assert grads(guidance) == [] and not images.requires_grad
    assert all(p.requires_grad for p in guidance.fake_unet.parameters())
    torch.testing.assert_close(images, model.generate(noise, LABELS).detach())

    model.zero_grad()
    losses, _ = model.guidance_turn(images, LABELS, torch.randn(4, 1, 8, 8), LABELS)
    sum(losses.values()).backward()
    assert grads(model.feedforward_model) == [] and grads(guidance.real_unet) == []
    assert len(grads(guidance.fake_unet)) == len(list(guidance.fake_unet.parameters()))
    if gan:
        assert len(grads(guidance.cls_pred_branch)) == len(list(guidance.cls_pred_branch.parameters()))

    torch.optim.AdamW(model.parameters(), 0.1).step()  # over everything: what has no gradient stays
    after = model.state_dict()
    for name, value in before.items():
        moved = not torch.equal(value, after[name])
        assert moved == name.startswith(("guidance_model.fake_unet", "guidance_model.cls_pred_branch", "fake_unets")), (
            name
        )


class FixedFeatures(torch.nn.Module):
    """A network whose one feature map is the noisy image itself, and whose image is zero."""

    def __init__(self):
        super().__init__()
        self.feature_channels = {4: 8}
        self.scale = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, x, sigma, labels, features=None):
        return 0 * x if features is None else (0 * x, self.encode(x, sigma, labels, features))

    def encode(self, x, sigma, labels, features):
        assert features == [4]
        return [self.scale * x]


def fixed_gan(**options):
    guidance = GuidanceModel(FixedFeatures(), gan_classifier=True, **options)
    mean = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8 * 4 * 4, 1, bias=False))
    torch.nn.init.constant_(mean[1].weight, 1 / 128)  # the logit is the mean of the image
    guidance.cls_pred_branch.heads = torch.nn.ModuleList([mean])
    return guidance


def test_gan_losses_follow_their_formulas():
    guidance = fixed_gan(diffusion_gan=False)
    real, fake = torch.randn(4, 8, 4, 4), torch.randn(4, 8, 4, 4) - 1
    r, f = real.mean((1, 2, 3)), fake.mean((1, 2, 3))
    losses, log = guidance.compute_guidance_clean_cls_loss(real, LABELS, fake, LABELS)
    torch.testing.assert_close(losses["guidance_cls_loss"], (f.exp().log1p() + (-r).exp().log1p()).mean())
    torch.testing.assert_close((log["real_logit"], log["fake_logit"]), (r.mean(), f.mean()))

    fake.requires_grad_()
    losses = guidance.compute_generator_clean_cls_loss(fake, LABELS)
    losses["gen_cls_loss"].backward()
    torch.testing.assert_close(losses["gen_cls_loss"], (-f).exp().log1p().mean())
    expected = -torch.sigmoid(-f) / 4 / 128  # d softplus(-f) / df = -sigmoid(-f)
    torch.testing.assert_close(fake.grad, expected.reshape(4, 1, 1, 1).expand_as(fake))
    assert grads(guidance) == []


def test_diffusion_gan_noises_up_to_its_level():
    guidance = fixed_gan(diffusion_gan_max_timestep=10)
    zeros = torch.zeros(2000, 8, 4, 4)
    noise_std = guidance.compute_cls_logits(zeros, torch.zeros(2000, dtype=torch.long)).std() * 128**0.5
    torch.testing.assert_close(noise_std, guidance.karras_sigmas[:10].square().mean().sqrt(), rtol=0.1, atol=0)


def test_heads_on_the_teachers_features_leave_fake_unet_to_its_task():
    """They see the same whatever `fake_unet` has learnt, one logit per resolution, and train alone."""
    model = unet_model(gan_classifier=True, gan_features="teacher", gan_resolutions=[8, 4], diffusion_gan=False)
    guidance, images = model.guidance_model, torch.randn(4, 1, 8, 8)
    logits = guidance.compute_cls_logits(images, LABELS)
    assert logits.shape == (4, 2)
    for parameter in guidance.fake_unet.parameters():
        parameter.data.zero_()
    assert torch.equal(guidance.compute_cls_logits(images, LABELS), logits)
    guidance.compute_guidance_clean_cls_loss(images, LABELS, images, LABELS)[0]["guidance_cls_loss"].backward()
    assert grads(guidance.fake_unet) == [] and len(grads(guidance.cls_pred_branch)) == 2 * len(
        grads(guidance.cls_pred_branch.heads[0])
    )


def test_f_divergences_weight_by_the_heads_at_the_same_noise():
    """The loss of dmd, each image weighted by its normalised ratio at the noise level that both denoisers saw."""
    model = unet_model(gan_classifier=True, f_divergence="kl")
    guidance, x = model.guidance_model, torch.randn(4, 1, 8, 8)
    sigma, noise = (
        guidance.karras_sigmas[[100, 150, 650, 690]],
        torch.randn_like(x),
    )  # two bins of a hundred levels each
    noisy = x + sigma.reshape(-1, 1, 1, 1) * noise
    with torch.no_grad():
        logits = guidance.cls_pred_branch(guidance.fake_unet.encode(noisy, sigma, LABELS, [4]))[:, 0]
        ratio = logits.exp()
        means = ratio.reshape(2, 2).mean(1).repeat_interleave(2)
        weight = ratio / means
        predictions = guidance.real_unet(noisy, sigma, LABELS), guidance.fake_unet(noisy, sigma, LABELS)
    losses, _ = guidance.compute_distribution_matching_loss(x, LABELS, sigma, noise)
    torch.testing.assert_close(losses["loss_dm"], dmd_loss(x, *predictions, scale=weight / weight.mean()))
    assert (logits - logits.mean()).abs().max() > 0.01


def test_sid_is_its_loss_on_what_both_denoisers_see():
    guidance = gaussian_guidance()
    guidance.objective, guidance.sid_alpha = "sid", 1.2
    x, sigma = (
        torch.randn(4, 1, 3, 3, dtype=torch.float64).requires_grad_(),
        torch.tensor([0.1, 0.5, 2.0, 20.0]).double(),
    )
    noise = torch.randn_like(x)
    losses, log = guidance.compute_distribution_matching_loss(x, LABELS, sigma, noise)
    losses["loss_dm"].backward()
    y = x.detach().clone().requires_grad_()
    noisy = y + sigma.reshape(-1, 1, 1, 1) * noise
    expected = sid_loss(y, guidance.real_unet(noisy, sigma, LABELS), guidance.fake_unet(noisy, sigma, LABELS), 1.2)
    expected.backward()
    torch.testing.assert_close(losses["loss_dm"], expected)
    torch.testing.assert_close(x.grad, y.grad)
    assert not log["dmtrain_noisy"].requires_grad and not log["dmtrain_pred_fake"].requires_grad


def test_one_encoder_pass_serves_both_guidance_losses():
    """As in the paper, fake images go through `fake_unet` once: two calls in all, the other for real images."""
    model = UnifiedModel(GuidanceModel(tiny_unet(), gan_classifier=True))
    calls, encoder = [], model.guidance_model.fake_unet.run_encoder
    model.guidance_model.fake_unet.run_encoder = lambda *a, **k: (calls.append(len(a[0])), encoder(*a, **k))[1]
    images = torch.randn(4, 1, 8, 8)
    torch.manual_seed(1)
    losses, _ = model.guidance_turn(images, LABELS, images[:3], LABELS[:3])
    assert calls == [4, 3] and set(losses) == {"loss_fake_mean", "guidance_cls_loss"}
    losses["guidance_cls_loss"].backward()
    shared = grads(model.guidance_model)

    guidance = model.guidance_model
    guidance.zero_grad()
    torch.manual_seed(1)
    noisy, sigma = guidance.add_noise(images)
    fake_logits = guidance.cls_pred_branch(guidance.fake_unet.encode(noisy, sigma, LABELS, guidance.gan_resolutions))
    noisy, sigma = guidance.add_noise(images[:3])
    real_logits = guidance.cls_pred_branch(
        guidance.fake_unet.encode(noisy, sigma, LABELS[:3], guidance.gan_resolutions)
    )
    expected = F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()
    expected.backward()
    torch.testing.assert_close(losses["guidance_cls_loss"], expected)
    torch.testing.assert_close(shared, grads(guidance), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"objective": "sid"}, {"f_divergence": "kl"}, {"diffusion_gan": False}])
def test_each_network_call_has_the_labels_of_its_images(monkeypatch, options):
    model, seen = UnifiedModel(GuidanceModel(tiny_unet(), gan_classifier=True, **options)), []
    precondition = Denoiser.precondition

    def told(net, x, sigma, labels, features):
        seen.append(labels.tolist())
        return precondition(net, x, sigma, labels, features)

    monkeypatch.setattr(Denoiser, "precondition", told)
    images, ours, theirs = torch.randn(4, 1, 8, 8), torch.tensor([3, 1, 0, 2]), torch.tensor([7, 9, 8, 6])
    model.generator_turn(images, ours)
    assert len(seen) >= 4 and all(labels == ours.tolist() for labels in seen)
    seen.clear()
    model.guidance_turn(images, ours, images, theirs)
    assert seen.count(theirs.tolist()) == 1 and seen.count(ours.tolist()) == len(seen) - 1 >= 1
