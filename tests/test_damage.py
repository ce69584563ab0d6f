"""Files that users hand in, damaged at random: each is refused in one line, or only numbers were hit."""

import numpy as np
import pytest
import torch
from conftest import ROOT, write_zip
from edm_files import edm_tensors, write_edm
from test_generate import untrained

import checkpoint
import train_teacher
from data import load_dataset
from import_teacher import load
from support.options import parse_args
from support.script import UserError


def read_config(path):
    return parse_args(train_teacher.OPTIONS, "", ["--config", str(path)])


KINDS = {  # file -> who writes it, who reads it
    "checkpoint.pt": (lambda path: untrained(path, ["cat", "dog"]), checkpoint.load_network),
    "config.yaml": (lambda path: path.write_bytes((ROOT / "config_train0.yaml").read_bytes()), read_config),
    "images.zip": (write_zip, lambda path: load_dataset("folder", path, 16)),
    "edm.pkl": (write_edm, load),
    "edm.pth": (lambda path: torch.save(edm_tensors(), path), load),
    "old.pth": (lambda path: torch.save(edm_tensors(), path, _use_new_zipfile_serialization=False), load),
}


def damaged(good, random):
    """`good` with a few bytes changed, cut short, or with another piece near its end, where a ZIP has its directory."""
    bad = bytearray(good)
    match random.integers(3):
        case 0:
            for position in random.integers(0, len(bad), random.integers(1, 20)):
                bad[position] = random.integers(256)
        case 1:
            del bad[random.integers(len(bad)) :]
        case 2:
            start = len(bad) - random.integers(1, 400)
            bad[start : start + random.integers(1, 9)] = random.bytes(random.integers(1, 9))
    return bad


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files_get_one_line(tmp_path, name):
    write, read = KINDS[name]
    write(tmp_path / name)
    read(tmp_path / name)
    good, random, refused = (tmp_path / name).read_bytes(), np.random.default_rng(0), 0
    for _ in range(50):
        (tmp_path / name).write_bytes(damaged(good, random))
        try:
            read(tmp_path / name)
        except UserError as refusal:
            refused += 1
            assert "\n" not in str(refusal) and str(tmp_path) in str(refusal)
    assert refused > 20
