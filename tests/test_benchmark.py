"""What DMD2 costs, counted, and the benchmark as a user runs it."""

import json
from importlib.util import find_spec

import torch
from conftest import succeed, tiny_unet

from benchmark import count
from guidance import GuidanceModel
from unified_model import UnifiedModel


def test_an_iteration_at_ratio_10_costs_at_most_four_and_a_half_forward_passes():
    net = tiny_unet(model_channels=16, channel_mult=(1, 2, 2), img_channels=3)
    model = UnifiedModel(GuidanceModel(net))
    noise, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    forward = count(lambda: net(noise, torch.ones(4), labels))[0]
    generate = count(lambda: model.generate(noise, labels))[0]
    generator_turn = count(lambda: model.generator_turn(noise, labels)[0]["loss_dm"].backward())[0]
    guidance_turn = count(lambda: model.guidance_turn(noise, labels)[0]["loss_fake_mean"].backward())[0]
    assert generate == forward
    assert 4.9 * forward < generator_turn <= 5 * forward
    assert 2.9 * forward < guidance_turn <= 3 * forward
    assert (generator_turn + 9 * generate + 10 * guidance_turn) / 10 <= 4.5 * forward


def test_benchmark_tells_speed_ceiling_and_memory(tmp_path):
    network = ["--label_dim", 0, "--img_resolution", 8, "--model_channels", 16, "--channel_mult", 1, 2, "--batch_size", 32]
    network += ["--peers"] if find_spec("diffusers") else []
    told = succeed("benchmark.py", "--device", "cpu", *network, "--repeats", 2, "--output", tmp_path / "b.json", cwd=tmp_path)
    result = json.loads((tmp_path / "b.json").read_text())
    rows = result["rows"]
    for name in ("teacher step", "guidance turn", "generator turn", "one step", "Heun, 18 steps"):
        assert name in told and rows[name]["images_per_second"] > 0 and rows[name]["share_of_ceiling"] > 0
    assert rows["Heun, 18 steps"]["images_per_second"] < rows["one step"]["images_per_second"]
    assert not find_spec("diffusers") or rows["diffusers step"]["images_per_second"] > 0
    assert set(rows["teacher step"]["seconds"]) == {"data and noise", "network", "clipping and optimizer", "average", "logging"}
    operators = result["operators"]
    assert abs(sum(operators.values()) - 1) < 1e-6 and {"convolution", "group_norm", "silu"} <= operators.keys()
    assert max(operators, key=operators.get) == "convolution"
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]
