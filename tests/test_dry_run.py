import re
import signal

import pytest
import torch
from conftest import ROOT, TINY, TINY_NET, needs_muon, run_script, saved_for_backward, succeed, write_zip
from test_config import assert_refused
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import train_dmd2
import train_teacher
from guidance import GuidanceModel
from model import SimpleUNet
from networks.song_unet import SongUNet
from support import config
from support.config import DMD2, TEACHER, UserError, parse_args
from support.costs import LiveMemory
from support.dry_run import AsOnCuda, on_device
from support.runs import Run
from unified_model import UnifiedModel

DRY = [*TINY[:4], "--dry_run"]
GAN = ["--gan_classifier", "--ema_decay", "0.5"]


def rows(printed):
    """The table of memory, in GiB, and the TFLOP per iteration."""
    found = {name.strip(): float(value) for name, value in re.findall(r"^  (.{20}) +([\d.]+)$", printed, re.M)}
    return found | {"tflop": float(re.search(r"arithmetic: (\S+) TFLOP", printed)[1])}


class CountedRun(Run):
    """A real run whose second iteration, the first that finds the optimizers' moments, is measured as it goes."""

    def goes_on(self):
        if self.step == 2:
            self.memory.__exit__(None, None, None)
            self.flops.__exit__(None, None, None)
        if self.step == 1:
            parameters = [p for part in self.parts.values() if isinstance(part, torch.nn.Module) for p in part.parameters()]
            CountedRun.flops = FlopCounterMode(display=False).__enter__()
            CountedRun.memory = LiveMemory(on_device("cpu"), parameters, "cpu").__enter__()
            CountedRun.before = self.memory.now
        return super().goes_on()


@pytest.mark.parametrize("way", ["teacher", "dmd2", "sid"])
def test_a_dry_run_counts_what_the_real_loop_takes(request, tmp_path, monkeypatch, capsys, way):
    """FLOPs agree exactly. Memory beyond that of the start agrees within 10%, even for so small a network."""
    script, table = (train_teacher, TEACHER) if way == "teacher" else (train_dmd2, DMD2)
    arguments = [*TINY[:2], "--batch_size", 64, "--output_dir", tmp_path / "out", "--device", "cpu", "--step_number", 3]
    if way == "teacher":
        arguments += [*TINY_NET, "--dropout", 0, "--grad_accum", 2]  # for dropout, a CPU keeps more than CUDA does
    else:
        teacher = request.getfixturevalue("runs") / "teacher" / "teacher_final.pt"
        arguments += ["--teacher_checkpoint", teacher, "--dfake_gen_update_ratio", 1]
        arguments += ["--objective", "sid"] if way == "sid" else [*GAN, "--gan_resolutions", 8, 4, "--grad_accum", 2]
    arguments = [str(argument) for argument in arguments]
    assert script.main(parse_args(table, "", [*arguments, "--dry_run"])) == 0
    counted = rows(capsys.readouterr().out)

    monkeypatch.setattr(script, "Run", CountedRun)
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)  # pytest's own stay
    script.main(parse_args(table, "", arguments))
    memory = CountedRun.memory
    assert counted["tflop"] == pytest.approx(CountedRun.flops.get_total_flops() / 1e12, rel=1e-3)
    assert counted["activations"] + counted["gradients"] == pytest.approx((memory.peak - CountedRun.before) / 2**30, rel=0.1)
    assert counted["gradients"] == pytest.approx(memory.gradients / 2**30, rel=1e-3)


@pytest.mark.parametrize("build", [SimpleUNet, SongUNet])
def test_bf16_on_meta_keeps_what_cudas_autocast_keeps(monkeypatch, build):
    """Beside fake tensors, which follow the rules of CUDA's own autocast."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *arguments: True)

    def kept(device):
        with torch.device(device):
            net = build(img_resolution=16, model_channels=32, attn_resolutions=())  # fused attention has no fake
            net.middle = torch.nn.ModuleList()
            return saved_for_backward(net, torch.empty(512, 3, 16, 16), torch.ones(512), torch.zeros(512, dtype=torch.long))

    with AsOnCuda("bf16"):
        ours = kept("meta")
    with FakeTensorMode(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        theirs = kept("cuda")
    assert ours == pytest.approx(theirs, rel=0.005)


@pytest.mark.parametrize("build", [SimpleUNet, SongUNet])
@pytest.mark.parametrize("options", [dict(), dict(gan_classifier=True, f_divergence="js"), dict(objective="sid")])
def test_no_turn_mixes_devices_or_waits_for_the_gpu(build, options):
    """On fake tensors of a CUDA device: an operator of two devices, or a value read back, is an error there."""
    small = dict(img_resolution=16, model_channels=16, num_blocks=1, channel_mult=(1, 2))
    model = UnifiedModel(GuidanceModel(build(**small), **options))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to("cuda")
        noise, labels = torch.empty(4, 3, 16, 16, device="cuda"), torch.zeros(4, dtype=torch.long, device="cuda")
        losses, _, images = model.generator_turn(noise, labels)
        losses |= model.guidance_turn(images, labels, noise, labels)[0]
        assert {images.device.type, *(loss.device.type for loss in losses.values())} == {"cuda"}
        with pytest.raises(RuntimeError, match="device"):
            model.generate(noise, labels.cpu())


def test_the_loops_run_on_meta_and_write_nothing(runs, tmp_path):
    """Reading a value back from `meta` would fail. A folder that another run holds stays as it is."""
    teacher = ["--teacher_checkpoint", runs / "teacher" / "teacher_final.pt"]
    ways = {
        "train_teacher.py": [[*TINY_NET, "--precision", "bf16"]],
        "train_dmd2.py": [
            [*teacher, *GAN, "--gan_features", "teacher", "--f_divergence", "js", "--grad_accum", 4, "--precision", "bf16"],
            [*teacher, "--objective", "sid", *GAN, "--diffusion_gan_max_timestep", 400],
        ],
    }
    for script, arguments in ways.items():
        for way in arguments:
            printed = succeed(script, *DRY, *way, "--output_dir", tmp_path / "out", "--log_every", 1, "--sample_every", 1)
            assert "TFLOP per iteration" in printed
    assert not any(tmp_path.iterdir())
    before = {path: path.stat().st_mtime_ns for path in (runs / "dmd2").rglob("*")}
    resume = [*teacher, *GAN, "--output_dir", runs / "dmd2", "--resume_from_checkpoint", "latest", "--step_number", 10]
    assert " 6 iterations" in succeed("train_dmd2.py", *DRY, *resume)
    assert {path: path.stat().st_mtime_ns for path in (runs / "dmd2").rglob("*")} == before


def test_grad_accum_is_the_least_that_fits(runs):
    arguments = [*DRY, "--teacher_checkpoint", runs / "teacher" / "teacher_final.pt", "--batch_size", 48, "--peak_tflops", 0.1]
    used = rows(succeed("train_dmd2.py", *arguments, "--grad_accum", 4))["together"]
    printed = succeed("train_dmd2.py", *arguments, "--memory_gb", used / 0.85 * 1.05)
    assert "use --grad_accum 4," in printed and rows(printed)["together"] > used
    seconds = rows(printed)["tflop"] / 0.04
    assert f"{seconds:.3g} s per iteration, {seconds * 100_000 / 3600:.3g} hours" in printed
    assert "too little even for one image" in succeed("train_dmd2.py", *arguments, "--memory_gb", 1e-4)


@needs_muon
def test_a_batch_in_parts_takes_the_same_arithmetic():
    """Muon's products count once per batch."""
    arguments = [*DRY, *TINY_NET, "--optimizer", "muon"]
    whole, parts = (rows(succeed("train_teacher.py", *arguments, "--grad_accum", n))["tflop"] for n in (1, 8))
    assert parts == pytest.approx(whole, rel=1e-3)


def test_what_is_missing_is_told_as_in_a_real_run(runs, tmp_path, monkeypatch):
    done = run_script("train_dmd2.py", *DRY, "--teacher_checkpoint", tmp_path / "none.pt")
    assert_refused(done, "imports a pretrained one; --dry_run also takes a network's name: SimpleUNet, SongUNet")
    done = run_script("train_dmd2.py", *DRY, "--teacher_checkpoint", "DiffusersUNet")  # it has no default arguments
    assert_refused(done, "--teacher_checkpoint DiffusersUNet: there is no such file")
    done = run_script("train_teacher.py", "--dry_run", "--dataset", "folder", "--data_dir", tmp_path / "none")
    assert_refused(done, "does not exist")
    teacher = runs / "teacher" / "teacher_final.pt"
    done = run_script("train_dmd2.py", *DRY, "--teacher_checkpoint", teacher, "--gan_classifier", "--gan_resolutions", 16)
    assert_refused(done, "--gan_resolutions 16")
    monkeypatch.setattr(config, "TORCHRUN", True)
    with pytest.raises(UserError, match="without torchrun"):
        parse_args(TEACHER, "", ["--dry_run"])


# ---- docs/memory-and-time.md ------------------------------------------------------------------------------------------------


def page(heading):
    """The rows of the table under a heading of the page, as lists of cells."""
    section = (ROOT / "docs" / "memory-and-time.md").read_text().split(f"## {heading}")[1].split("\n## ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines[2:]]


def test_the_pages_hours_follow_from_its_counts():
    hours = [float(row[4]) * float(row[5].replace(",", "")) / 0.4 / 3600 for row in page("What each training takes")]
    cards = page("On some cards")
    assert cards
    for card, _, _, peak, *cells in cards:
        gpus = int(card.split(" x ")[0]) if " x " in card else 1
        for cell, expected in zip(cells, hours, strict=True):
            assert float(cell.split()[0]) == pytest.approx(expected / float(peak) / gpus, rel=0.05)


@pytest.mark.slow
def test_the_pages_counts_are_todays(tmp_path):
    """Each in its own process, since all tensors on the device are counted."""
    thousand_classes = ["--dataset", "folder", "--data_dir", write_zip(tmp_path / "data.zip", labels=range(1000), size=64)]
    for command, *cells in page("What each training takes"):
        name, *arguments = command.strip("`").split()
        data = thousand_classes if "DhariwalUNet" in arguments else ["--dataset", "mnist5k"]
        counted = rows(succeed(name, *arguments, *data, "--dry_run"))
        kept = counted["weights"] + counted["averaged weights"] + counted["optimizers' moments"]
        working = counted["gradients"] + counted["activations"]
        today = [kept, working, counted["together"], counted["tflop"]]
        assert [float(cell) for cell in cells[:4]] == pytest.approx(today, rel=0.02), command
