import pytest
import torch

from discriminator import gan_head


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
