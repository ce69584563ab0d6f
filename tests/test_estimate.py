import re
import signal

import pytest
from conftest import ROOT, TINY_NET, refuses, tiny_unet, write_images
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import train_dmd2
import train_teacher
from evaluation.costs import LiveMemory
from extras import estimate
from run import Run

WAYS = {
    "teacher": ["teacher", *TINY_NET, "--dropout", 0, "--grad_accum", 2],  # for dropout, a CPU keeps more than CUDA
    "gan": ["dmd2", "--gan_classifier", "--f_divergence", "js", "--gan_resolutions", 8, 4, "--grad_accum", 2],
    "sid": ["dmd2", "--objective", "sid"],
    "muon": ["dmd2", "--optimizer", "muon"],
    "another generator": ["dmd2", "--grad_accum", 2],  # so that its gradients are there in the second part
}


def estimated(capsys, *arguments):
    """What `python -m extras.estimate` prints: (the text, the table of memory in GiB with the TFLOP per iteration)."""
    estimate.main([str(argument) for argument in arguments])
    text = capsys.readouterr().out
    rows = {name.strip(): float(value) for name, value in re.findall(r"^  (.{20}) *([\d.e-]+)$", text, re.M)}
    return text, rows | {"tflop": float(re.search(r"^(\S+) TFLOP", text, re.M)[1])}


class MeasuredRun(Run):
    """A real run whose second iteration, the first that finds the optimizers' moments, is measured as it goes."""

    def goes_on(self):
        if self.step == 1:
            MeasuredRun.flops, MeasuredRun.memory = FlopCounterMode(display=False), LiveMemory()
            self.flops.__enter__(), self.memory.__enter__()
        if self.step == 2:
            self.memory.__exit__(None, None, None), self.flops.__exit__(None, None, None)
        return super().goes_on()


@pytest.mark.parametrize("way", WAYS)
def test_the_estimate_is_what_the_real_loop_takes(request, tmp_path, monkeypatch, capsys, way):
    """FLOPs agree, and memory beyond that before the iteration within a few percent, even for so small a network."""
    kind, *options = WAYS[way]
    options += ["--dataset", "mnist5k", "--batch_size", 64, "--device", "cpu", "--step_number", 3]
    if kind == "dmd2":
        teacher = request.getfixturevalue("runs") / "teacher" / "teacher_final.pt"
        options += ["--teacher_checkpoint", teacher, "--dfake_gen_update_ratio", 1]
        if way == "another generator":
            net = tiny_unet(model_channels=16)
            other = checkpoint.load(teacher) | {"ema_state_dict": net.state_dict(), "model_config": net.config}
            checkpoint.save(tmp_path / "t.pt", other)
            options += ["--generator_checkpoint", tmp_path / "t.pt"]
    _, rows = estimated(capsys, kind, *options)

    script = train_teacher if kind == "teacher" else train_dmd2
    monkeypatch.setattr(script, "Run", MeasuredRun)
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)  # pytest's own stay
    script.main([str(option) for option in [*options, "--output_dir", tmp_path]])
    working = sum(rows[name] for name in ("gradients", "data", "activations")) - 5000 * 64 / 2**30
    assert rows["tflop"] == pytest.approx(MeasuredRun.flops.get_total_flops() / 1e12, rel=1e-3)
    assert working == pytest.approx(MeasuredRun.memory.peak / 2**30, rel=0.03)


def test_grad_accum_is_the_least_that_fits_and_hours_follow(capsys):
    options = ["teacher", *TINY_NET, "--batch_size", 48, "--peak_tflops", 0.1, "--step_number", 7200]
    _, rows = estimated(capsys, *options, "--grad_accum", 4)
    text, whole = estimated(capsys, *options, "--memory_gb", rows["together"] / 0.85 * 1.001)
    assert "use --grad_accum 4;" in text and whole["together"] > rows["together"] and whole["tflop"] == rows["tflop"]
    assert f"{rows['tflop'] / 0.04:.3g} s per iteration, {2 * rows['tflop'] / 0.04:.3g} hours in total" in text
    assert "it fits;" in estimated(capsys, *options, "--memory_gb", 8)[0]
    assert "too little even for one image" in estimated(capsys, *options, "--memory_gb", 1e-4)[0]


def test_the_users_data_are_counted(tmp_path, capsys):
    data = ["--dataset", "folder", "--data_dir", write_images(tmp_path / "images"), "--batch_size", 4]
    _, rows = estimated(capsys, "teacher", *data, *TINY_NET, "--precision", "bf16")
    assert rows["data"] == pytest.approx((20 * 3 * 64 + 4 * 3 * 64 * 12) / 2**30, rel=1e-3)


MISTAKES = {
    "": "give teacher or dmd2 first",
    "dmd3 --batch_size 4": "not 'dmd3'",
    "dmd2 --teacher_checkpoint DiffusersUNet": "there is no such file",  # no default arguments
    "dmd2 --teacher_checkpoint SimpleUNet --gan_classifier --gan_resolutions 5": "resolutions 5",
    "dmd2 --teacher_checkpoint SimpleUNet --generator_checkpoint no.pt": "--generator_checkpoint no.pt: there is",
    "teacher --dataset folder --data_dir none": "none",
    "teacher --grad_accum 3": "--batch_size 128 must be divisible by --grad_accum 3",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes_are_told(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    refuses(MISTAKES[arguments], "extras.estimate", *arguments.split())


# ---- docs/memory-and-time.md ----------------------------------------------------------------------------------------


def page(heading):
    """The rows of the table under a heading of the page, as lists of cells."""
    section = (ROOT / "docs" / "memory-and-time.md").read_text().split(f"## {heading}")[1].split("\n## ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines[2:]]


def test_the_pages_hours_follow_from_its_counts():
    hours = [float(row[4]) * float(row[5].replace(",", "")) / 0.4 / 3600 for row in page("What each training takes")]
    for _, peak, *cells in page("Hours on some cards"):
        found = [float(re.search(r"[\d.]+", cell)[0]) for cell in cells]
        assert found == pytest.approx([one / float(peak) for one in hours], rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("row", range(4))
def test_the_pages_counts_are_todays(monkeypatch, capsys, row):
    monkeypatch.chdir(ROOT)
    command, *cells = page("What each training takes")[row]
    _, rows = estimated(capsys, *command.strip("`").split())
    kept = rows["weights"] + rows["averaged weights"] + rows["moments"]
    today = [kept, rows["together"] - kept, rows["together"], rows["tflop"]]
    assert [float(cell) for cell in cells[:4]] == pytest.approx(today, rel=0.01)
