import atexit
import importlib
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model import SimpleUNet
from support.script import UserError

ROOT = Path(__file__).parents[1]


def flags(*words, **options):
    """The words of a command line. An option that is True or False is a flag without a value."""
    words = list(words)
    for name, value in options.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        words += [f"--no-{name}"] if value is False else [f"--{name}"] if value is True else [f"--{name}", *values]
    return [str(word) for word in words]


TINY = flags(dataset="mnist5k", batch_size=16, step_number=4, device="cpu")
TINY_NET = flags(img_resolution=8, model_channels=8, channel_mult=[1, 2], num_blocks=1)

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["torch._dynamo", "torchvision", "pytest"])


def run_script(script, *arguments, cwd=ROOT, env=None, **options):
    """The script as a user runs it; returns the finished process, output captured as text.

    Its command line is `flags(*arguments, **options)`. It starts as a fork of a process that has only imported torch,
    which saves seconds per call; with `env`, as a new process.
    """
    command = [sys.executable, str(ROOT / script), *flags(*arguments, **options)]
    if env:
        return subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=600)
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        process = processes.Process(target=be_script, args=(command[1:], cwd, out.name, err.name), daemon=True)
        process.start()
        process.join(600)
        if process.exitcode is None:
            raise subprocess.TimeoutExpired(command, 600, out.read(), err.read())
        return subprocess.CompletedProcess(command, process.exitcode, out.read(), err.read())


def be_script(argv, folder, out, err):
    for name, number in ((out, 1), (err, 2)):
        os.dup2(os.open(name, os.O_WRONLY), number)
    os.chdir(folder)
    sys.argv, sys.path[0] = argv, str(ROOT)
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which processes of multiprocessing leave out


def succeed(script, *arguments, **options):
    done = run_script(script, *arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def torchrun(script, *arguments, cwd=ROOT, env=None, **options):
    """The same under torchrun, in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / script)]
    command += flags(*arguments, **options)
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


def start(script, *arguments, preexec_fn=None, **options):
    """The script as a process that goes on; its output is in pipes."""
    command = [sys.executable, str(ROOT / script), *flags(*arguments, **options)]
    return subprocess.Popen(command, stdout=-1, stderr=-1, text=True, preexec_fn=preexec_fn)


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_refused(done, message):
    """One line and exit status 2."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and message in lines[0], done.stderr


def refuses(message, script, *arguments, **options):
    """Asserts that the script, called in this process, raises a UserError of one line with `message` in it."""
    with pytest.raises(UserError) as error:
        importlib.import_module(script.removesuffix(".py")).main(flags(*arguments, **options))
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def tiny_unet(**changes):
    torch.manual_seed(0)
    options = dict(img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1, 2), num_blocks=1)
    net = SimpleUNet(**options | changes)
    for parameter in net.parameters():  # zero-initialised layers would hide mistakes
        torch.nn.init.normal_(parameter, std=0.1) if parameter.abs().sum() == 0 else None
    return net.eval()


class GaussianDenoiser(torch.nn.Module):
    """The exact denoiser of data N(mean, std^2) for every pixel: E[x0 | x0 + sigma n]."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = mean, std
        self.config = {}

    def forward(self, x, sigma, labels):
        sigma = torch.as_tensor(sigma).reshape(-1, 1, 1, 1)
        return (self.std**2 * x + sigma**2 * self.mean) / (self.std**2 + sigma**2)


def write_images(folder, classes=("cat", "dog"), each=10, size=16, mode="RGB", seed=0):
    """A folder with one subfolder of PNGs per class."""
    random = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(each):
            pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(folder / name / f"{index}.png")
    return folder


def write_zip(path, labels=(0, 1, 2, 0, 1, 2), size=16, listed=None, seed=0):
    """A ZIP in the layout of EDM's dataset tool; `listed` replaces the content of dataset.json."""
    random = np.random.default_rng(seed)
    with zipfile.ZipFile(path, "w") as archive:
        pairs = []
        for index, label in enumerate(labels):
            name = f"00000/img{index:08d}.png"
            with archive.open(name, "w") as file:
                Image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file, "PNG")
            pairs.append([name, label])
        archive.writestr("dataset.json", json.dumps({"labels": pairs} if listed is None else listed))
    return path


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A tiny teacher and a tiny generator, trained through the command line; a folder with `teacher/` and `dmd2/`."""
    folder = tmp_path_factory.mktemp("runs")
    train_both(folder, save_every=2, log_every=1)
    return folder


@pytest.fixture(scope="session")
def unconditional(tmp_path_factory):
    """`runs` without classes: trained on `set.zip`, whose images have no labels."""
    folder = tmp_path_factory.mktemp("unconditional")
    data = write_zip(folder / "set.zip", labels=range(40), size=8, listed={"labels": None})
    train_both(folder, dataset="folder", data_dir=data, save_every=2, log_every=1)
    return folder


def train_both(folder, **options):
    succeed("train_teacher.py", *TINY, *TINY_NET, output_dir=folder / "teacher", **options)
    options |= dict(teacher_checkpoint=folder / "teacher" / "teacher_final.pt", output_dir=folder / "dmd2")
    succeed("train_dmd2.py", *TINY, gan_classifier=True, ema_decay=0.5, dfake_gen_update_ratio=2, **options)


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """torch-fidelity's Inception with random weights, as the file that it would download."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    patch = pytest.MonkeyPatch()
    patch.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
    patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    torch.manual_seed(0)
    network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    patch.undo()
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


def saved_for_backward(net, *inputs):
    """The bytes that a forward pass of `net` keeps for the backward pass, without parameters."""
    parameters = {parameter.untyped_storage()._cdata for parameter in net.parameters()}
    saved = {}  # by storage, which two saved tensors may share

    def pack(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(*inputs)
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in saved.items() if storage not in parameters)
