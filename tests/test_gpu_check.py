"""The page of extras/gpu_check.py, on a CPU."""

import torch
from conftest import ROOT, TINY_NET, flags, succeed

from extras import gpu_check


def test_all_parts_are_on_the_page(tmp_path):
    """Without a compiler one part fails, and the others go on."""
    options = [*TINY_NET, "--device", "cpu", "--batch_size", 10, "--rounds", 1, "--output", tmp_path / "page.md"]
    env = {"CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    told = succeed("extras/gpu_check.py", *options, env=env)
    lines = [line for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    steps = {name: cells for name, *cells in rows if ": " in name}
    assert len(steps) == 5 * 3 and told.endswith("page.md\n")
    for name, (loss, norm, images_per_second, *_) in steps.items():
        worst = max(float(loss), float(norm))
        assert (1e-6 < worst < 0.1) if name.startswith("bf16") else worst < 1e-5, name
        assert float(images_per_second) > 0
    assert ["bf16, compiled", "FAILED: RuntimeError('torch.compile is not available')"] in rows
    results = {name: cells for name, *cells in rows[-8:]}
    assert results.pop("largest difference of the resumed teacher's weights")[0] == "0.0e+00"
    assert len(results) >= 6 and {status for status, _ in results.values()} == {"0"}


def test_a_part_that_fails_is_told():
    """A script by its last line, and a step whose numbers are not the CPU's by how far they are off."""
    assert "| 2: train_teacher.py: error: unknown argument --x |" in gpu_check.run("x", "train_teacher.py --x")
    options = flags(*TINY_NET, device="cpu", batch_size=4, rounds=1)
    args, doubled = gpu_check.parse_args(gpu_check.OPTIONS, "", options), {}
    gpu_check.complete(args)
    for name, task in gpu_check.make_tasks(args, "cpu").items():
        loss, norm = gpu_check.step(args, torch.device("cpu"), *task)
        doubled[name] = 2 * loss, norm
    for row in gpu_check.steps(args, "here", doubled).splitlines():
        assert row.split("|")[2:4] == [" 5.0e-01 ", " 0.0e+00 "]
