import torch

from objectives import dmd_gradient, dmd_loss


def tensors():
    torch.manual_seed(0)
    images, pred_real, pred_fake = torch.randn(3, 4, 3, 5, 5, dtype=torch.float64)
    return images.requires_grad_(), pred_real, pred_fake


def test_dmd_loss_and_its_gradient_are_those_on_paper():
    """g = (D_f - D_r) / mean|x - D_r| per image; the loss is half the mean of g^2, its gradient g / (number of elements)."""
    x, real, fake = tensors()
    loss = dmd_loss(x, real, fake)
    loss.backward()
    g = torch.stack([(fake[i] - real[i]) / (x[i].detach() - real[i]).abs().mean() for i in range(4)])
    torch.testing.assert_close(loss, 0.5 * g.square().mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(x.grad, g / x.numel(), rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(dmd_gradient(x, real, fake), g)
    assert not dmd_gradient(x, real, fake).requires_grad


def test_dmd_scale_weights_the_images():
    x, real, fake = tensors()
    scale = torch.tensor([0.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    dmd_loss(x, real, fake, scale).backward()
    torch.testing.assert_close(x.grad, scale[:, None, None, None] * dmd_gradient(x, real, fake) / x.numel(), rtol=1e-9, atol=1e-15)


def test_dmd_of_an_image_that_the_teacher_would_not_change():
    """w is at least 1e-5, so that the gradient stays finite; what is not finite all the same is 0."""
    x, _, _ = tensors()
    real, fake = x.detach().clone(), x.detach() + 1e-3
    fake[0, 0, 0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    grad = dmd_gradient(x, real, fake)
    torch.testing.assert_close(grad[1:], torch.full_like(grad[1:], 100.0))
    assert torch.equal(grad[0, 0, 0, :3], torch.zeros(3, dtype=torch.float64)) and grad.isfinite().all()
