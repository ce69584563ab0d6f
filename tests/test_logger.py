"""What `metrics.jsonl` holds."""

from types import SimpleNamespace

import torch
from conftest import metrics

from support import logger
from support.options import parse_args
from train_teacher import OPTIONS


def test_a_line_holds_the_means_of_what_each_step_had(tmp_path, monkeypatch):
    """Steps 1 to 4, then 5 to 8; `b` comes every second step, as the generator's losses do."""
    clock = iter([100.0, 102.0, 110.0])
    monkeypatch.setattr(logger, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    options = ["--output_dir", str(tmp_path), "--log_every", "4", "--step_number", "8", "--batch_size", "16"]
    log = logger.Logger(parse_args(OPTIONS, "", options))
    for step in range(1, 9):
        log.log(step, {"a": torch.tensor(float(step))} | ({"b": 10.0 * step} if step % 2 == 0 else {}))
    log.close()
    first, second = metrics(tmp_path)
    assert first == {"step": 4, "a": 2.5, "b": 30.0, "images_per_second": 32.0}
    assert second == {"step": 8, "a": 6.5, "b": 70.0, "images_per_second": 8.0}
