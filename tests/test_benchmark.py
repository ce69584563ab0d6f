import json
from importlib.util import find_spec

from conftest import succeed


def test_benchmark_tells_speed_and_arithmetic(tmp_path):
    network = ["--label_dim", 0, "--img_resolution", 8, "--model_channels", 16, "--channel_mult", 1, 2]
    options = ["--device", "cpu", "--batch_size", 32, "--repeats", 2, "--output", tmp_path / "b.json"]
    peers = ["--peers"] if find_spec("diffusers") else []
    told = succeed("extras/benchmark.py", *network, *options, *peers, "--optimizer", "adamw", cwd=tmp_path)
    result = json.loads((tmp_path / "b.json").read_text())
    names = ["teacher step", "guidance turn", "generator turn", "one step", "Heun, 18 steps", "teacher step, NCHW"]
    assert list(result["rows"]) == names + ["diffusers step", "diffusers Heun"] * bool(peers)
    assert all(name in told for name in result["rows"])
    rows = list(result["rows"].values())
    assert all(row["images_per_second"] > 0 and row["flops_per_second"] > 0 for row in rows)
    flops = [row["flops_per_second"] / row["images_per_second"] for row in rows]  # per image
    for counted, passes in zip(flops, [3, 3, 5, 1, 35], strict=False):
        assert 0.9 * passes < counted / flops[3] <= 1.01 * passes
    assert rows[3]["images_per_second"] / rows[4]["images_per_second"] == result["speed_ratio"] > 1
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]
