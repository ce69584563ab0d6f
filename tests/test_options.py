import importlib
import os

import pytest
from conftest import ROOT, assert_refused, refuses, run_script

import evaluate
import generate
import train_dmd2
import train_teacher
from model import SimpleUNet
from support.options import parse_args

T, D, G, E = train_teacher, train_dmd2, generate, evaluate


def parse(script, *arguments):
    return parse_args(script.OPTIONS, "", [str(argument) for argument in arguments])


def test_command_line_beats_yaml_beats_default(tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("lr: 3e-4\nbatch_size: 7\nchannel_mult: [1, 3]\nhflip: false\n")
    args = parse(T, "--config", config, "--batch_size", 9)
    assert (args.lr, args.batch_size, args.step_number) == (3e-4, 9, 100_000)
    assert args.channel_mult == [1, 3] and args.hflip is False
    assert args.given == {"lr", "batch_size", "channel_mult", "hflip"}
    assert parse(T, "--config", config, "--hflip", "--channel_mult", 1, 2).hflip is True
    assert not parse(T).given


def test_defaults_are_those_of_the_documentation():
    args = parse(D)
    assert (args.generator_lr, args.guidance_lr, args.dfake_gen_update_ratio) == (2e-6, 2e-6, 10)
    assert (args.conditioning_sigma, args.min_step_percent, args.max_step_percent) == (80.0, 0.02, 0.98)
    assert (args.batch_size, args.step_number, args.save_every) == (128, 100_000, 5000)
    assert args.teacher_checkpoint == "./log/checkpoints/teacher/teacher_final.pt" and args.dataset == "cifar10"
    assert (args.gen_cls_loss_weight, args.cls_loss_weight, args.wandb_sample_every) == (3e-3, 1e-2, 1000)
    assert parse(G).num_samples == 16 and parse(T).lr == 1e-4 and parse(E).num_samples == 50_000


def test_wandb_block_names_the_flags(tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("wandb:\n  enabled: true\n  key: secret\n  mode: offline\n  log_every: 5\nwandb_project: flat\n")
    args = parse(T, "--config", config, "--wandb_mode", "disabled")
    assert args.wandb and args.wandb_key == "secret" and args.wandb_mode == "disabled"
    assert args.wandb_log_every == 5 and args.wandb_project == "flat"


@pytest.mark.parametrize("path", sorted([*ROOT.glob("config_*.yaml"), *ROOT.glob("configs/*.yaml")]), ids=str)
def test_shipped_configs_are_valid(path):
    args = parse(T if path.stem.endswith("0") else D, "--config", path)
    assert args.output_dir.startswith("./log/")
    if path.stem.endswith("0"):
        T.build_network(args, 1, 10)
    else:
        D.build_model(args, SimpleUNet(64, channel_mult=[1] * 5, model_channels=8, num_blocks=1), "cpu")


def test_numbers_and_paths_as_people_and_yaml_write_them(tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    numbers = "lr: 1e-4\nstep_number: 1e5\nseed: 0\nresume_from_checkpoint: null\n"  # YAML reads 1e-4 as text
    (tmp_path / "a.yaml").write_text(numbers + "data_dir: $SCRATCH/cifar\noutput_dir: ~/runs\n")
    args = parse(T, "--config", tmp_path / "a.yaml", "--wandb_dir", "~/w")
    assert args.lr == 1e-4 and args.step_number == 100_000 and isinstance(args.step_number, int)
    assert args.data_dir == "/scratch/me/cifar" and args.output_dir == os.path.expanduser("~/runs")
    assert args.wandb_dir == os.path.expanduser("~/w")


@pytest.mark.parametrize("side, attends", [(32, [16]), (48, [])])
def test_the_default_attends_where_the_network_has_that_resolution(side, attends):
    net = T.build_network(parse(T, "--img_resolution", side, "--model_channels", 8, "--num_blocks", 1), 1, 2)
    assert net.config["attn_resolutions"] == attends


WRONG = [  # script, arguments, part of the one-line message
    (T, "--lrr 1", "unknown argument --lrr (did you mean --lr?)"),
    (T, "my.yaml", "unknown argument my.yaml (did you mean --config my.yaml?)"),
    (T, "--lr", "--lr: expected one argument"),
    (T, "--lr fast", "--lr needs a number, not 'fast'"),
    (T, "--lr nan", "--lr must be above 0, not nan"),
    (T, "--batch_size 0", "--batch_size must be at least 1, not 0"),
    (T, "--batch_size 2.5", "--batch_size needs a whole number, not 2.5"),
    (T, "--seed=-1", "--seed must be at least 0"),
    (T, "--dropout 1", "--dropout must be at least 0 and at most 0.99"),
    (T, "--dataset cifar", "must be one of cifar10, mnist, fashion_mnist, mnist5k, folder, not 'cifar' (did you mean"),
    (T, "--device cuda:x", "--device must be one of auto, cpu, cuda, cuda:0, cuda:1"),
    (T, "--img_resolution 20", "img_resolution 20 cannot be halved 3 times"),
    (T, "--img_resolution 48 --attn_resolutions 16 12", "_resolutions 16: the network's resolutions are 48, 24, 12, 6"),
    (T, "--img_channels 2", "--img_channels must be 1 or 3"),
    (T, "--model_channels 20", "model_channels must be a multiple of 8"),
    (T, "--channel_mult 1 two", "--channel_mult needs a number, not 'two'"),
    (T, "--channel_mult", "--channel_mult: expected at least one argument"),
    (T, "--output_dir=", "--output_dir must not be empty"),
    (T, "--config /no/such.yaml", "--config /no/such.yaml: No such file"),
    (D, "--f_divergence jl --gan_classifier", "--f_divergence must be one of rkl, kl, js"),
    (D, "--conditioning_sigma 1e9", "--conditioning_sigma must be above 0 and at most 1000000"),
    (D, "--lr 1e-4", "unknown argument --lr"),
    (T, "--device cuda:99999999999999999999", "--device must be one of auto, cpu, cuda, cuda:0, cuda:1"),
    (T, "--batch_size 10 --grad_accum 3", "--batch_size 10 must be divisible by --grad_accum 3"),
    (T, "--overwrite --resume_from_checkpoint latest", "give one of them"),
    (E, "--features classifier --fid_reference x.npz", "--fid_reference needs --features inception"),
    (E, "--num_samples 3", "--num_samples must be at least 4"),
    (D, "--rho 0.001", "--rho must be at least 0.1"),
]
WRONG_YAML = [  # content, part of the one-line message
    ("- lr\n- 3\n", "needs lines of the form `key: value`"),
    ("lr: 1\nlr: 2\n", "line 2: key lr is given twice"),
    ("lr:\t1\n\tbatch_size: 2", '"bad.yaml", line 1'),
    ("wandb_run_name: 2024-13-45", "not YAML: month must be in 1..12"),
    ("lr: !!int x", "not YAML"),
    (b"\xff\xfe\x00\x01", "not YAML"),
    ("a: " + "[" * 20_000, "not YAML"),
    ("batchsize: 1", "unknown key batchsize (did you mean batch_size?)"),
    ("wandb:\n  projekt: x\n", "unknown key wandb_projekt (did you mean wandb_project?)"),
    ("wandb:\n  enabled: true\nwandb_enabled: true\n", "unknown key wandb_enabled"),
    ("wandb:\n  mode: offline\nwandb_mode: online\n", "wandb_mode is given twice"),
    ("lr: null", "lr needs a single value, not None"),
    ("lr: [1, 2]", "lr needs a single value"),
    ("channel_mult: {2: 1}", "channel_mult needs a list"),
    ("hflip: maybe", "hflip must be one of true, false"),
    ("batch_size: true", "batch_size needs a number, not 'True'"),
    ("1: 2", "unknown key 1"),
]


@pytest.mark.parametrize("script, arguments, message", WRONG, ids=str)
def test_wrong_options_are_refused(tmp_path, monkeypatch, script, arguments, message):
    monkeypatch.chdir(tmp_path)
    refuses(message, script.__name__, *arguments.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content, message", WRONG_YAML)
def test_wrong_yaml_is_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    refuses(message, "train_teacher.py", config="bad.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


def test_a_mistake_is_one_line_and_exit_status_2(tmp_path):
    assert_refused(run_script("train_teacher.py", "--lrr", 1, cwd=tmp_path), "error: unknown argument --lrr")


SCRIPTS = ("train_teacher", "train_dmd2", "generate", "evaluate", "compare", "export", "import_teacher")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_the_options_by_headings(script, capsys):
    module = importlib.import_module(script)
    with pytest.raises(SystemExit, match="0"):
        module.main(["--help"])
    told = capsys.readouterr().out
    for heading, table in module.OPTIONS.items():
        assert f"\n{heading}:\n" in told and all(f"--{option.name}" in told for option in table)
