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


@pytest.mark.parametrize("objective", ["dmd", "sid"])
def test_the_objective_sees_what_both_denoisers_make_of_the_noised_image(objective):
    """Both denoisers in closed form, D(x_t) = (s^2 x_t + sigma^2 m) / (s^2 + sigma^2), written out here."""
    (m1, s1), (m2, s2) = (0.5, 0.4), (-0.3, 0.8)
    real, fake = GaussianDenoiser(m1, s1), GaussianDenoiser(m2, s2)
    guidance = GuidanceModel(real, fake_unet=fake, objective=objective, sid_alpha=1.2)
    torch.manual_seed(0)
    x, noise = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    sigma = torch.tensor([0.01, 0.4, 3.0, 60.0], dtype=torch.float64)
    y, s = x.clone().requires_grad_(), sigma.reshape(4, 1, 1, 1)
    losses, log = guidance.compute_distribution_matching_loss(x.requires_grad_(), LABELS, sigma, noise)
    losses["loss_dm"].backward()

    y_t = y + s * noise
    real = (s1**2 * y_t + s**2 * m1) / (s1**2 + s**2)
    fake = (s2**2 * y_t + s**2 * m2) / (s2**2 + s**2)
    expected = dmd_loss(y, real.detach(), fake.detach()) if objective == "dmd" else sid_loss(y, real, fake, 1.2)
    expected.backward()
    torch.testing.assert_close(losses["loss_dm"], expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-12)
    assert not log["dmtrain_noisy"].requires_grad and not log["dmtrain_pred_fake"].requires_grad


def test_noise_levels_are_ascending_and_drawn_from_their_range(monkeypatch):
    options = dict(num_train_timesteps=200, min_step_percent=0.29, max_step_percent=0.5)
    guidance = GuidanceModel(GaussianDenoiser(0.0, 1.0), **options)
    sigmas = guidance.sigmas
    assert sigmas.shape == (200,) and (sigmas.diff() > 0).all()
    torch.testing.assert_close(sigmas[[0, -1]], torch.tensor([0.002, 80.0]))
    assert (guidance.min_step, guidance.max_step) == (58, 100)
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


def test_the_schedule_of_flow_matching_is_even_in_t():
    """sigma = t / (1 - t) between the same ends, then shifted: t' = 3 t / (1 + 2 t)."""
    teacher, options = GaussianDenoiser(0.0, 1.0), dict(schedule="flow", sigma_min=0.25, sigma_max=4.0)
    sigmas = GuidanceModel(teacher, **options).sigmas.double()
    t = sigmas / (1 + sigmas)
    torch.testing.assert_close(t, torch.linspace(0.2, 0.8, 1000, dtype=torch.float64), rtol=0, atol=1e-6)
    shifted = GuidanceModel(teacher, shift=3.0, **options).sigmas
    assert shifted[[0, -1]].tolist() == pytest.approx([0.25, 4.0])
    t = shifted.double() / (1 + shifted.double())
    unshifted = t / (3 - 2 * t)  # the inverse of SD3's eq. 23
    torch.testing.assert_close(unshifted.diff(), unshifted.diff().mean().expand(999), rtol=1e-2, atol=0)


def test_the_schedule_keeps_to_the_teachers_noise_levels():
    teacher = GaussianDenoiser(0.0, 1.0)
    teacher.sigma_min, teacher.sigma_max = 0.01, 14.6
    assert GuidanceModel(teacher, sigma_min=0.002).sigmas[[0, -1]].tolist() == pytest.approx([0.01, 14.6])
    with pytest.raises(ValueError, match="the networks know no noise level between"):
        GuidanceModel(teacher, sigma_min=20, sigma_max=80)
    fake_unet = GaussianDenoiser(0.0, 1.0)
    fake_unet.sigma_max = 5.0
    assert GuidanceModel(teacher, fake_unet=fake_unet).sigmas[[0, -1]].tolist() == pytest.approx([0.01, 5.0])


WRONG = [
    (dict(schedule="cosine"), "schedule must be karras or flow"),
    (dict(objective="sdi"), "objective must be dmd or sid"),
    (dict(gan_classifier=True, gan_resolutions=[5]), "gan_resolutions 5: the encoder has 8, 4"),
    (dict(gan_classifier=True, teacher=GaussianDenoiser(0.0, 1.0)), "gan_features fake: this network has no feature"),
    (dict(f_divergence="lk"), "f_divergence must be one of rkl"),
    (dict(f_divergence="kl"), "f_divergence kl needs objective dmd and gan_classifier"),
    (dict(f_divergence="kl", gan_classifier=True, objective="sid"), "needs objective dmd"),
    (dict(min_step_percent=0.9, max_step_percent=0.1), "min_step_percent 0.9 must be below max_step_percent 0.1"),
]


@pytest.mark.parametrize("options, told", WRONG)
def test_arguments_that_do_not_fit_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        GuidanceModel(options.pop("teacher", None) or tiny_unet(), **options)


def test_networks_that_are_handed_in_are_trained_as_they_are():
    """An exact teacher has neither parameters nor features: generator, `fake_unet` and heads come from elsewhere."""
    fake_unet, generator = tiny_unet(), tiny_unet(model_channels=16)
    guidance = GuidanceModel(GaussianDenoiser(0.0, 1.0), fake_unet=fake_unet.requires_grad_(False), gan_classifier=True)
    model = UnifiedModel(guidance, generator=generator.requires_grad_(False))
    assert guidance.fake_unet is fake_unet and model.feedforward_model is generator
    losses, _, images = model.generator_turn(torch.randn(4, 1, 8, 8), LABELS)
    sum(losses.values()).backward()
    losses, _ = model.guidance_turn(images, LABELS, images, LABELS)
    sum(losses.values()).backward()
    assert all_have_grads(generator) and all_have_grads(fake_unet) and all_have_grads(guidance.cls_pred_branch)


@pytest.mark.parametrize("prediction", ["edm", "flow"])
def test_fake_loss_is_weighted_error(prediction):
    """Off by exactly e it is the mean of (sigma^-2 + sigma_data^-2) e^2, or of flow's (1 + 1 / sigma)^2 e^2."""
    guidance = GuidanceModel(GaussianDenoiser(0.0, 1.0), sigma_data=0.4, prediction=prediction)
    x, sigma = torch.rand(4, 1, 6, 6, requires_grad=True), torch.tensor([0.1, 0.5, 2.0, 50.0])
    guidance.fake_unet.forward = lambda x_t, sigma, labels: x.detach() + 0.1 * sigma.reshape(-1, 1, 1, 1)
    losses, _ = guidance.compute_loss_fake(x, LABELS, sigma, torch.zeros_like(x))
    weight = sigma**-2 + 0.4**-2 if prediction == "edm" else (1 + 1 / sigma) ** 2
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
    assert all_have_grads(model.feedforward_model)
    one_step = few_step_sampler(model.feedforward_model, z, LABELS, [3.0])
    torch.testing.assert_close(model.generate_at(z, LABELS), one_step)


def test_each_step_of_a_student_has_its_own_fake_unet():
    model = UnifiedModel(GuidanceModel(tiny_unet()), student_sigmas=[3.0, 1.0])
    assert [net is model.guidance_model.fake_unet for net in model.fake_unets] == [True, False]
    losses, _ = model.guidance_turn(torch.randn(4, 1, 8, 8), LABELS, student_step=1)
    losses["loss_fake_mean"].backward()
    assert not grads(model.fake_unets[0]) and grads(model.fake_unets[1])
    with torch.no_grad():
        model.fake_unets[1].conv_out.weight += 1
    losses = [model.generator_turn(torch.randn(4, 1, 8, 8), LABELS, step)[0]["loss_dm"] for step in (0, 1)]
    assert losses[0] == 0 < losses[1]


def unet_model(**options):
    model = UnifiedModel(GuidanceModel(tiny_unet(), **options))
    for parameter in model.guidance_model.fake_unet.parameters():  # a fake_unet unlike the teacher
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def grads(module):
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


def all_have_grads(module):
    return len(grads(module)) == len(list(module.parameters()))


def test_teacher_is_frozen_and_fake_and_generator_start_as_its_copies():
    teacher = tiny_unet(dropout=0.5)
    model = UnifiedModel(GuidanceModel(teacher)).train()
    guidance = model.guidance_model
    assert guidance.real_unet is teacher and not teacher.training and guidance.fake_unet.training
    assert not any(p.requires_grad for p in teacher.parameters())
    for network in (model.feedforward_model, guidance.fake_unet):
        assert all(p.requires_grad for p in network.parameters())
        for ours, theirs in zip(network.parameters(), teacher.parameters(), strict=True):
            assert torch.equal(ours, theirs) and ours is not theirs


METHODS = [
    {},
    {"gan_classifier": True},
    {"objective": "sid"},
    {"objective": "sid", "gan_classifier": True, "gan_features": "teacher", "gan_resolutions": [8, 4]},
    {"f_divergence": "js", "gan_classifier": True, "gan_resolutions": [4, 8]},
]


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_each_turn_leaves_the_other_side_alone(options):
    model, noise = unet_model(**options), torch.randn(4, 1, 8, 8)
    guidance = model.guidance_model
    before = copy.deepcopy(model.state_dict())

    losses, _, images = model.generator_turn(noise, LABELS)
    sum(losses.values()).backward()
    assert all_have_grads(model.feedforward_model) and grads(guidance) == [] and not images.requires_grad
    assert all(p.requires_grad for p in guidance.fake_unet.parameters())
    torch.testing.assert_close(images, model.generate(noise, LABELS).detach())

    model.zero_grad()
    losses, _ = model.guidance_turn(images, LABELS, torch.randn(4, 1, 8, 8), LABELS)
    sum(losses.values()).backward()
    assert grads(model.feedforward_model) == [] and grads(guidance.real_unet) == []
    assert all_have_grads(guidance.fake_unet)
    assert "gan_classifier" not in options or all_have_grads(guidance.cls_pred_branch)

    torch.optim.AdamW(model.parameters(), 0.1).step()  # over everything: what has no gradient stays
    trained = ("guidance_model.fake_unet", "guidance_model.cls_pred_branch", "fake_unets")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith(trained), name


def test_the_generators_gan_loss_is_that_of_its_images():
    guidance = unet_model(gan_classifier=True).guidance_model
    images = torch.randn(4, 1, 8, 8, requires_grad=True)
    torch.manual_seed(1)
    expected = F.softplus(-guidance.compute_cls_logits(images, LABELS)).mean()
    (gradient,) = torch.autograd.grad(expected, images)
    torch.manual_seed(1)
    losses = guidance.compute_generator_clean_cls_loss(images, LABELS)
    losses["gen_cls_loss"].backward()
    torch.testing.assert_close((losses["gen_cls_loss"], images.grad), (expected, gradient))
    assert grads(guidance) == []


def test_the_heads_see_all_noise_levels():
    guidance, seen = GuidanceModel(tiny_unet(), gan_classifier=True, num_train_timesteps=10), []
    encode = guidance.fake_unet.encode
    guidance.fake_unet.encode = lambda x, sigma, *more: (seen.append((x, sigma)), encode(x, sigma, *more))[1]
    guidance.compute_cls_logits(torch.zeros(2000, 1, 8, 8), torch.zeros(2000, dtype=torch.long))
    ((noisy, sigma),) = seen
    assert sigma.min() == guidance.sigmas[0] and sigma.max() == guidance.sigmas[-1]
    torch.testing.assert_close(noisy.std(), sigma.square().mean().sqrt(), rtol=0.01, atol=0)


def test_heads_on_the_teachers_features_leave_fake_unet_to_its_task():
    """They see the same whatever `fake_unet` has learnt, one logit per resolution, and train alone."""
    model = unet_model(gan_classifier=True, gan_features="teacher", gan_resolutions=[8, 4])
    guidance, images = model.guidance_model, torch.randn(4, 1, 8, 8)
    torch.manual_seed(1)
    logits = guidance.compute_cls_logits(images, LABELS)
    assert logits.shape == (4, 2)
    for parameter in guidance.fake_unet.parameters():
        parameter.data.zero_()
    torch.manual_seed(1)
    assert torch.equal(guidance.compute_cls_logits(images, LABELS), logits)
    guidance.compute_guidance_clean_cls_loss(images, LABELS, images, LABELS)[0]["guidance_cls_loss"].backward()
    assert grads(guidance.fake_unet) == [] and all_have_grads(guidance.cls_pred_branch)


def test_f_divergences_weight_by_the_heads_at_the_same_noise():
    """The loss of dmd, each image weighted by its normalised ratio at the noise level that both denoisers saw."""
    model = unet_model(gan_classifier=True, f_divergence="kl")
    guidance, x = model.guidance_model, torch.randn(4, 1, 8, 8)
    sigma, noise = guidance.sigmas[[100, 150, 650, 690]], torch.randn_like(x)  # two bins of a hundred levels
    noisy = x + sigma.reshape(-1, 1, 1, 1) * noise
    with torch.no_grad():
        logits = guidance.cls_pred_branch(guidance.fake_unet.encode(noisy, sigma, LABELS, [4]))[:, 0]
        ratio = logits.exp()
        weight = ratio / ratio.reshape(2, 2).mean(1).repeat_interleave(2)
        predictions = guidance.real_unet(noisy, sigma, LABELS), guidance.fake_unet(noisy, sigma, LABELS)
    losses, _ = guidance.compute_distribution_matching_loss(x, LABELS, sigma, noise)
    torch.testing.assert_close(losses["loss_dm"], dmd_loss(x, *predictions, scale=weight / weight.mean()))
    assert (logits - logits.mean()).abs().max() > 0.01


def test_one_encoder_pass_serves_both_guidance_losses():
    """As in the paper, fake images go through `fake_unet` once: two calls in all, the other for real images."""
    model = UnifiedModel(GuidanceModel(tiny_unet(), gan_classifier=True))
    guidance, images, calls = model.guidance_model, torch.randn(4, 1, 8, 8), []
    encoder = guidance.fake_unet.run_encoder
    guidance.fake_unet.run_encoder = lambda *a, **k: (calls.append(len(a[0])), encoder(*a, **k))[1]
    torch.manual_seed(1)
    losses, log = model.guidance_turn(images, LABELS, images[:3], LABELS[:3])
    assert calls == [4, 3] and set(losses) == {"loss_fake_mean", "guidance_cls_loss"}
    losses["guidance_cls_loss"].backward()
    shared = grads(guidance)

    guidance.zero_grad()
    torch.manual_seed(1)
    fake_logits, real_logits = (
        guidance.cls_pred_branch(guidance.fake_unet.encode(*guidance.add_noise(x), y, guidance.gan_resolutions))
        for x, y in ((images, LABELS), (images[:3], LABELS[:3]))
    )
    expected = F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()
    expected.backward()
    torch.testing.assert_close(losses["guidance_cls_loss"], expected)
    torch.testing.assert_close((log["real_logit"], log["fake_logit"]), (real_logits.mean(), fake_logits.mean()))
    torch.testing.assert_close(shared, grads(guidance), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"objective": "sid"}, {"f_divergence": "kl"}])
def test_each_network_call_has_the_labels_of_its_images(monkeypatch, options):
    model, seen = UnifiedModel(GuidanceModel(tiny_unet(), gan_classifier=True, **options)), []
    forward = Denoiser.forward

    def told(net, x, sigma, labels, *more, **named):
        seen.append(labels.tolist())
        return forward(net, x, sigma, labels, *more, **named)

    monkeypatch.setattr(Denoiser, "forward", told)
    images, ours, theirs = torch.randn(4, 1, 8, 8), torch.tensor([3, 1, 0, 2]), torch.tensor([7, 9, 8, 6])
    model.generator_turn(images, ours)
    assert len(seen) >= 4 and all(labels == ours.tolist() for labels in seen)
    seen.clear()
    model.guidance_turn(images, ours, images, theirs)
    assert seen.count(theirs.tolist()) == 1 and seen.count(ours.tolist()) == len(seen) - 1 >= 1
