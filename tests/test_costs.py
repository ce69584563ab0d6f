import pytest
import torch
from conftest import saved_for_backward
from torch._subclasses.fake_tensor import FakeTensorMode

from model import SimpleUNet
from networks.song_unet import SongUNet
from support.costs import count


def test_counted_arithmetic_is_that_of_the_convolution():
    """2 * 16 * 16 products and sums per weight; the memory is that of the result."""
    x, weight = torch.randn(1, 3, 16, 16), torch.randn(8, 3, 3, 3)
    flops, memory = count(lambda: torch.nn.functional.conv2d(x, weight, padding=1))
    assert flops == 2 * 16 * 16 * 8 * 3 * 9 and memory == 4 * 8 * 16 * 16


def test_saved_for_backward_counts_each_storage_once():
    layer, x = torch.nn.Linear(4, 4), torch.randn(5, 4)
    assert saved_for_backward(torch.nn.Sequential(layer, torch.nn.Sigmoid()), x) == 2 * 4 * 5 * 4  # input and sigmoid, no weights
    assert saved_for_backward(lambda_module(lambda x: x * x * x), x.requires_grad_()) == 2 * 4 * 5 * 4  # x and x * x


def lambda_module(function):
    module = torch.nn.Module()
    module.forward = function
    return module


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("build", [SimpleUNet, SongUNet])
def test_bf16_keeps_half_the_memory_on_every_device(monkeypatch, device, build):
    """On fake tensors, which follow the rules of each device's autocast: next to nothing is kept in float32.

    CUDA's rules make float32 of group norms and of upsampling, where they are left to them.
    """
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *arguments: True)
    kept = []
    for enabled in (False, True):
        with FakeTensorMode(), torch.device(device):
            net = build(attn_resolutions=())  # fused attention has no fake; the plain one is all float32
            net.middle = torch.nn.ModuleList()
            inputs = torch.empty(512, 3, 32, 32), torch.ones(512), torch.zeros(512, dtype=torch.long)
            with torch.autocast(device, torch.bfloat16, enabled=enabled, cache_enabled=False):
                kept.append(saved_for_backward(net, *inputs))
    assert 0.45 < kept[1] / kept[0] < 0.6, kept
