import pytest
import torch
from conftest import saved_for_backward, tiny_unet
from torch._subclasses.fake_tensor import FakeTensorMode

import train_dmd2
from evaluation.costs import AsOnCuda, count, forward_flops, iteration_flops
from guidance import GuidanceModel
from model import SimpleUNet
from networks.edm_unet import SongUNet
from support.options import parse_args
from unified_model import UnifiedModel


def meta(net, *options):
    """(options of train_dmd2.py, its model on `meta`)."""
    args = parse_args(train_dmd2.OPTIONS, None, options)
    return args, train_dmd2.build_model(args, net.to("meta"), "meta")


def test_counted_arithmetic_and_memory_are_those_of_the_convolution():
    """2 * 16 * 16 products and sums per weight; the memory is that of both results, and then of one."""
    x, weight = torch.empty(1, 3, 16, 16, device="meta"), torch.empty(8, 3, 3, 3, device="meta")
    convolve = lambda: torch.nn.functional.conv2d(x, weight, padding=1)  # noqa: E731
    flops = 2 * 16 * 16 * 8 * 3 * 9
    assert count(convolve) == (flops, 4 * 8 * 16 * 16)
    assert count(lambda: convolve() + convolve()) == (2 * flops, 3 * 4 * 8 * 16 * 16)
    assert count(lambda: [convolve().relu_()[0] for _ in range(3)]) == (3 * flops, 3 * 4 * 8 * 16 * 16)
    assert count(lambda: [convolve().sum() for _ in range(3)])[1] == 4 * 8 * 16 * 16 + 3 * 4


PASSES = {"": 4.4, "--dfake_gen_update_ratio 5": 4.8, "--student_sigmas 80 2.5": 4.9, "--objective sid": 4.6}
PASSES |= {f"--student_sigmas 80 5 1 --dfake_gen_update_ratio {ratio}": 5 + 4 / ratio for ratio in (1, 3)}


@pytest.mark.parametrize("options", PASSES)
def test_an_iterations_passes(options):
    """As in `unified_model.py`: backward passes count twice, but for inputs that need no gradient."""
    net = tiny_unet(model_channels=16, channel_mult=(1, 2, 2), img_channels=3)
    counted = iteration_flops(*meta(net, *options.split())) / forward_flops(net)
    assert PASSES[options] * 0.98 < counted <= PASSES[options]


def kept(build, device, side=32):
    """The bytes that a forward pass keeps. Fused attention has no fake, and the plain one is all float32: left out."""
    with torch.device(device):
        net = build(img_resolution=side, attn_resolutions=())
        net.middle = torch.nn.ModuleList()
        inputs = torch.empty(512, 3, side, side), torch.ones(512), torch.zeros(512, dtype=torch.long)
        return saved_for_backward(net, *inputs)


@pytest.mark.parametrize("build", [SimpleUNet, SongUNet])
def test_bf16_keeps_half_the_memory_on_every_device(monkeypatch, build):
    """CUDA's rules make float32 of group norms and of upsampling, where left to them. `meta` keeps what CUDA keeps."""
    # CUDA's autocast, and so its rules, work on fake tensors where there is no GPU.
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *arguments: True)
    with FakeTensorMode():
        for device in ("cpu", "cuda"):
            single = kept(build, device)
            with torch.autocast(device, torch.bfloat16, cache_enabled=False):
                half = kept(build, device)
            assert 0.45 < half / single < 0.6
    with AsOnCuda(bf16=True):
        assert kept(build, "meta") == pytest.approx(half, rel=0.005)


@pytest.mark.parametrize("build", [SimpleUNet, SongUNet])
@pytest.mark.parametrize("options", [dict(), dict(gan_classifier=True, f_divergence="js"), dict(objective="sid")])
def test_no_turn_mixes_devices_or_waits_for_the_gpu(build, options):
    """On fake tensors of a CUDA device: an operator of two devices, or a value read back, is an error there."""
    small = dict(img_resolution=16, model_channels=16, num_blocks=1, channel_mult=(1, 2))
    model = UnifiedModel(GuidanceModel(build(**small), **options))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.guidance_model.to("cuda"), model.feedforward_model.to("cuda")
        noise, labels = torch.empty(4, 3, 16, 16, device="cuda"), torch.zeros(4, dtype=torch.long, device="cuda")
        losses, _, images = model.generator_turn(noise, labels)
        losses |= model.guidance_turn(images, labels, noise, labels)[0]
        assert {images.device.type, *(loss.device.type for loss in losses.values())} == {"cuda"}
        with pytest.raises(RuntimeError, match="device"):
            model.generate(noise, labels.cpu())
