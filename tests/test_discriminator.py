import pytest
import torch

from discriminator import discriminator_gan_loss, gan_head, generator_gan_loss


def test_losses_follow_dmd2_equation_4():
    real, fake = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([0.3, -4.0])
    torch.testing.assert_close(generator_gan_loss(fake), (-fake).exp().log1p().mean())
    expected = fake.exp().log1p().mean() + (-real).exp().log1p().mean()
    torch.testing.assert_close(discriminator_gan_loss(real, fake), expected)
    fake.requires_grad_()
    generator_gan_loss(fake).backward()
    torch.testing.assert_close(fake.grad, -torch.sigmoid(-fake.detach()) / 2)  # largest where it is caught


@pytest.mark.parametrize("resolution, convolutions", [(1, 1), (2, 1), (4, 1), (7, 2), (8, 2), (16, 3)])
def test_head_gives_a_logit_for_each_image_of_any_resolution(resolution, convolutions):
    torch.manual_seed(0)
    head, features = gan_head(16, resolution), torch.randn(3, 16, resolution, resolution)
    logits = head(features)
    assert logits.shape == (3, 1)
    assert sum(isinstance(layer, torch.nn.Conv2d) for layer in head) == convolutions
    torch.testing.assert_close(head(features[1:2]), logits[1:2])  # images do not see each other
    for row in range(resolution):
        changed = features.clone()
        changed[:, :, row, -1 - row] += 1
        assert (head(changed) - logits).abs().min() > 1e-4  # every row and column counts
