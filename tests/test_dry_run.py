import re

import pytest
import torch
from conftest import TINY, TINY_NET, run_script, succeed, tiny_unet
from test_config import assert_refused
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import train_dmd2
import train_teacher
from guidance import GuidanceModel
from model import SimpleUNet
from networks.song_unet import SongUNet
from support.config import DMD2, TEACHER, UserError, parse_args
from support.costs import LiveMemory, saved_for_backward
from support.dry_run import AsOnCuda, on_device
from support.runs import Run
from unified_model import UnifiedModel

DRY = [*TINY[:4], "--dry_run"]
GAN = ["--gan_classifier", "--ema_decay", "0.5"]


def rows(printed):
    """The table of memory, in GiB, and the TFLOP of an iteration."""
    found = {name.strip(): float(value) for name, value in re.findall(r"^  (.{20}) +([\d.]+)$", printed, re.M)}
    return found | {"tflop": float(re.search(r"arithmetic: (\S+) TFLOP", printed)[1])}


class CountedRun(Run):
    """A real run whose iteration `counted` is measured as it goes."""

    counted = 0

    def goes_on(self):
        if self.step == self.counted + 1:
            self.memory.__exit__(None, None, None)
            self.flops.__exit__(None, None, None)
        goes_on = super().goes_on()
        if goes_on and self.step == self.counted:
            parameters = [p for part in self.parts.values() if isinstance(part, torch.nn.Module) for p in part.parameters()]
            CountedRun.flops = FlopCounterMode(display=False).__enter__()
            CountedRun.memory = LiveMemory(on_device("cpu"), parameters, "cpu").__enter__()
            CountedRun.before = self.memory.now
        return goes_on


WAYS = {
    "teacher": [],
    "teacher in parts": ["--grad_accum", "4"],
    "dmd2": [],
    "dmd2 with GAN": [*GAN, "--gan_resolutions", "8", "4"],
    "dmd2 in parts": [*GAN, "--grad_accum", "2"],
    "sid": ["--objective", "sid"],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_dry_run_counts_what_the_real_loop_takes(runs, tmp_path, monkeypatch, capsys, way):
    """The arithmetic exactly, the memory within 2%: an iteration with a generator's update, on the CPU and on `meta`."""
    script, table = (train_teacher, TEACHER) if "teacher" in way else (train_dmd2, DMD2)
    arguments = [*TINY[:2], "--batch_size", 64, *WAYS[way], "--output_dir", tmp_path / "out", "--device", "cpu", "--step_number", 3]
    arguments += TINY_NET if "teacher" in way else ["--teacher_checkpoint", runs / "teacher" / "teacher_final.pt"]
    arguments += [] if "teacher" in way else ["--dfake_gen_update_ratio", 1]
    arguments = [str(argument) for argument in arguments]
    assert script.main(parse_args(table, "", [*arguments, "--dry_run"])) == 0
    counted = rows(capsys.readouterr().out)

    monkeypatch.setattr(script, "Run", CountedRun)
    monkeypatch.setattr(CountedRun, "counted", 1)  # the first that finds the optimizers' moments
    script.main(parse_args(table, "", arguments))
    measured = CountedRun.memory
    assert counted["tflop"] == pytest.approx(CountedRun.flops.get_total_flops() / 1e12, rel=1e-3)
    print(way, counted, (measured.peak - CountedRun.before) / 2**30, measured.gradients / 2**30)
