import subprocess
import sys

import pytest
from conftest import ROOT, run_script

from support.config import BENCHMARK, DMD2, EVALUATE, GENERATE, SCRIPTS, TEACHER, UserError, parse_args


def parse(table, *arguments):
    return parse_args(table, "", [str(argument) for argument in arguments])


def test_command_line_beats_yaml_beats_default(tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("lr: 3e-4\nbatch_size: 7\nchannel_mult: [1, 3]\nhflip: false\n")
    args = parse(TEACHER, "--config", config, "--batch_size", 9)
    assert (args.lr, args.batch_size, args.step_number) == (3e-4, 9, 100_000)
    assert args.channel_mult == [1, 3] and args.hflip is False
    assert parse(TEACHER, "--config", config, "--hflip", "--channel_mult", 1, 2).hflip is True


def test_defaults_are_those_of_the_documentation():
    args = parse(DMD2)
    assert (args.generator_lr, args.guidance_lr, args.dfake_gen_update_ratio) == (2e-6, 2e-6, 10)
    assert (args.conditioning_sigma, args.min_step_percent, args.max_step_percent) == (80.0, 0.02, 0.98)
    assert (args.batch_size, args.step_number, args.save_every) == (128, 100_000, 5000)
    assert args.teacher_checkpoint == "./log/checkpoints/teacher/teacher_final.pt" and args.dataset == "cifar10"
    assert (args.gen_cls_loss_weight, args.cls_loss_weight, args.wandb_sample_every) == (3e-3, 1e-2, 1000)
    assert parse(GENERATE).num_samples == 16 and parse(TEACHER).lr == 1e-4
    assert parse(EVALUATE).num_samples == 50_000


def test_wandb_block_names_the_flags(tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("wandb:\n  enabled: true\n  key: secret\n  mode: offline\n  log_every: 5\nwandb_project: flat\n")
    args = parse(TEACHER, "--config", config, "--wandb_mode", "disabled")
    assert args.wandb and (args.wandb_key, args.wandb_mode, args.wandb_log_every, args.wandb_project) == (
        "secret",
        "disabled",
        5,
        "flat",
    )


@pytest.mark.parametrize("path", sorted([*ROOT.glob("config_*.yaml"), *ROOT.glob("configs/*.yaml")]), ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path):
    args = parse(TEACHER if path.stem.endswith("0") else DMD2, "--config", path, "--data_dir", ROOT)  # `folder` has to exist
    assert args.output_dir.startswith("./log/")


def test_numbers_as_people_and_yaml_write_them(tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("lr: 1e-4\nstep_number: 1e5\nseed: 0\nresume_from_checkpoint: null\n")  # YAML reads 1e-4 as text
    args = parse(TEACHER, "--config", config)
    assert args.lr == 1e-4 and args.step_number == 100_000 and isinstance(args.step_number, int)


def test_the_default_attends_where_the_network_has_that_resolution():
    """`config.yaml`, which holds the resulting options, is accepted as well."""
    assert parse(TEACHER).attn_resolutions == [16] and parse(TEACHER, "--img_resolution", 48).attn_resolutions == []
    assert parse(TEACHER, "--img_resolution", 48, "--attn_resolutions").attn_resolutions == []
    small = ["--img_resolution", "16", "--channel_mult", "1", "2"]  # of benchmark.py's network, which attends at 4
    assert parse_args(BENCHMARK, "", small, ROOT / "configs" / "mnist0.yaml").attn_resolutions == []


T, D, G, E, C = "train_teacher.py", "train_dmd2.py", "generate.py", "evaluate.py", "compare.py"
WRONG = [  # script, arguments, part of the one-line message
    (T, "--lrr 1", "unknown argument --lrr (did you mean --lr?)"),
    (T, "--learning_rate 1", "unknown argument --learning_rate"),
    (T, "--batch 3", "unknown argument --batch"),
    (T, "stray", "unknown argument stray"),
    (T, "my.yaml", "unknown argument my.yaml (did you mean --config my.yaml?)"),
    (T, "--lr", "--lr: expected one argument"),
    (T, "--lr fast", "--lr needs a number, not 'fast'"),
    (T, "--lr nan", "--lr must be above 0, not nan"),
    (T, "--lr inf", "--lr must be above 0, not inf"),
    (T, "--lr 0", "--lr must be above 0, not 0"),
    (T, "--lr=-1e-4", "--lr must be above 0, not -1e-4"),
    (T, "--batch_size 0", "--batch_size must be at least 1, not 0"),
    (T, "--batch_size 2.5", "--batch_size needs a whole number, not 2.5"),
    (T, "--step_number=-5", "--step_number must be at least 1"),
    (T, "--save_every 0", "--save_every must be at least 1"),
    (T, "--seed=-1", "--seed must be at least 0"),
    (T, "--ema_decay 1.5", "--ema_decay must be at least 0 and at most 1"),
    (T, "--dropout 1", "--dropout must be at least 0 and at most 0.99"),
    (
        T,
        "--dataset cifar",
        "--dataset must be one of cifar10, mnist, fashion_mnist, mnist5k, folder, not 'cifar' (did you mean cifar10?)",
    ),
    (T, "--dataset folder --data_dir /no/such/folder", "--data_dir /no/such/folder does not exist"),
    (T, "--device gpu", "--device must be auto, cpu, cuda, cuda:N or mps, not 'gpu'"),
    (T, "--device cuda:x", "--device must be auto, cpu, cuda, cuda:N or mps"),
    (T, "--img_resolution 20", "--img_resolution 20 must be divisible by 8"),
    (T, "--img_resolution 48 --attn_resolutions 16 12", "--attn_resolutions 16: the network's resolutions are 48, 24, 12, 6"),
    (T, "--img_resolution 4", "--img_resolution must be at least 8"),
    (T, "--img_channels 2", "--img_channels must be 1 or 3"),
    (T, "--model_channels 20", "--model_channels must be a multiple of 8"),
    (T, "--channel_mult 1 two", "--channel_mult needs a number, not 'two'"),
    (T, "--channel_mult", "--channel_mult: expected at least one argument"),
    (T, "--output_dir=", "--output_dir must not be empty"),
    (T, "--wandb_mode onlin", "--wandb_mode must be one of online, offline, disabled"),
    (T, "--config /no/such.yaml", "--config /no/such.yaml: No such file"),
    (T, "--config config_mnist0.yaml", "No such file or directory; it is now configs/mnist0.yaml"),
    (D, "--config config_train1_gan.yaml", "No such file or directory; it is now configs/train1_gan.yaml"),
    (D, "--sigma_min 5 --sigma_max 1", "--sigma_min (5.0) must be below --sigma_max (1.0)"),
    (D, "--min_step_percent 0.9 --max_step_percent 0.1", "--min_step_percent (0.9) must be below --max_step_percent (0.1)"),
    (D, "--max_step_percent 1.5", "--max_step_percent must be at least 0 and at most 1"),
    (D, "--dfake_gen_update_ratio 0", "--dfake_gen_update_ratio must be at least 1"),
    (D, "--conditioning_sigma 0", "--conditioning_sigma must be above 0"),
    (D, "--num_train_timesteps 1", "--num_train_timesteps must be at least 2"),
    (D, "--gen_cls_loss_weight=-1", "--gen_cls_loss_weight must be at least 0"),
    (D, "--objective dsm", "--objective must be one of dmd, sid"),
    (D, "--f_divergence kl", "--f_divergence kl takes its weights from the GAN's heads: add --gan_classifier"),
    (D, "--f_divergence js --gan_classifier --objective sid", "--f_divergence js needs --objective dmd, not sid"),
    (D, "--f_divergence jl --gan_classifier", "--f_divergence must be one of rkl, kl, js"),
    (D, "--gan_resolutions", "--gan_resolutions: expected at least one argument"),
    (D, "--student_sigmas 1 5", "--student_sigmas 1.0 5.0: must descend, starting with the most noise"),
    (D, "--student_sigmas 5 1 --student_steps 3", "--student_steps 3: --student_sigmas gives 2 levels; give one of them"),
    (D, "--gan_lr 1e-3", "--gan_lr needs --gan_classifier"),
    (D, "--alternate_turns --dfake_gen_update_ratio 1", "--alternate_turns needs a --dfake_gen_update_ratio of at least 2"),
    (C, "--seeds 0", "give --minutes, for equal time, or --forward_passes, for equal work"),
    (C, "--minutes 1 --forward_passes 10", "give --minutes, for equal time, or --forward_passes, for equal work"),
    (D, "--lr 1e-4", "unknown argument --lr: it is an option of train_teacher.py"),
    (T, "--teacher_checkpoint=x", "unknown argument --teacher_checkpoint: it is an option of train_dmd2.py"),
    (G, "--num_samples 0", "--num_samples must be at least 1"),
    (G, "--format gif", "--format must be one of grid, png, npz"),
    (G, "--steps 0", "--steps must be at least 1"),
    (E, "--features resnet", "--features must be one of inception, classifier"),
    (T, "--device cuda:200", "--device must be auto, cpu, cuda, cuda:N or mps"),
    (T, "--device cuda:99999999999999999999", "--device must be auto, cpu, cuda, cuda:N or mps"),
    (T, "--batch_size 10 --grad_accum 3", "--grad_accum 3 must divide --batch_size 10"),
    (T, "--overwrite --resume_from_checkpoint latest", "give only one of them"),
    (T, "--max_minutes 0", "--max_minutes must be above 0"),
    (T, "--keep_last 0", "--keep_last must be at least 1"),
    (E, "--features classifier --inception_score", "--inception_score needs --features inception"),
    (E, "--features classifier --fid_reference x.npz", "--fid_reference needs --features inception"),
    (E, "--num_samples 3", "--num_samples must be at least 4"),
    (D, "--rho 0.001", "--rho must be at least 0.1"),
]
WRONG_YAML = [  # content, part of the one-line message
    ("- lr\n- 3\n", "needs lines of the form `key: value`"),
    ("", "needs lines of the form `key: value`"),
    ("just words", "needs lines of the form `key: value`"),
    ("lr: 1\nlr: 2\n", "key lr is given twice"),
    ("wandb:\n  mode: offline\n  mode: online\n", "key mode is given twice"),
    ("lr:\t1\n\tbatch_size: 2", "line 1: not YAML"),
    ("lr: [1", "not YAML"),
    ("wandb_run_name: 2024-13-45", "not YAML: month must be in 1..12"),
    ("lr: !!int x", "not YAML"),
    (b"\xff\xfe\x00\x01", "not YAML"),
    ("learning_rte: 1", "unknown key learning_rte"),
    ("teacher_checkpoint: x", "unknown key teacher_checkpoint: it is an option of train_dmd2.py"),
    ("batchsize: 1", "unknown key batchsize (did you mean batch_size?)"),
    ("wandb:\n  projekt: x\n", "unknown key wandb_projekt (did you mean wandb_project?)"),
    ("wandb:\n  enabled: true\nwandb_enabled: true\n", "unknown key wandb_enabled"),
    ("wandb:\n  mode: offline\nwandb_mode: online\n", "wandb_mode is given twice"),
    ("lr: null", "lr needs a value"),
    ("lr: [1, 2]", "lr needs a single value"),
    ("lr: {a: 1}", "lr needs a value"),
    ("channel_mult: 2", "channel_mult needs a list"),
    ("channel_mult: []", "channel_mult needs a list"),
    ("hflip: maybe", "hflip must be true or false"),
    ("batch_size: true", "batch_size needs a number, not 'True'"),
    ("lr: .nan", "lr must be above 0, not nan"),
    ("1: 2", "unknown key 1"),
]


def assert_refused(done, message):
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and message in lines[0], done.stderr


@pytest.mark.parametrize("script, arguments, message", WRONG)
def test_wrong_options_get_one_line(tmp_path, script, arguments, message):
    assert_refused(run_script(script, *arguments.split(), cwd=tmp_path), message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content, message", WRONG_YAML)
def test_wrong_yaml_gets_one_line(tmp_path, content, message):
    (tmp_path / "bad.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(run_script(T, "--config", "bad.yaml", cwd=tmp_path), message)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


@pytest.mark.parametrize("script", [T, D, G, E, "benchmark.py", "import_teacher.py", "export.py"])
def test_help_answers_at_once(script, tmp_path):
    """It takes a fraction of a second, as torch is not imported."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = run_script(script, "--help", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0 and "--config" in done.stdout, done.stderr


def test_the_former_name_of_import_teacher_tells_the_new_one(tmp_path):
    done = run_script("import_edm.py", "--source", tmp_path / "none")
    assert done.returncode == 2 and done.stderr.splitlines()[0] == "import_edm.py is now import_teacher.py"
    assert len(done.stderr.splitlines()) == 2 and "--source" in done.stderr


def test_parse_errors_are_user_errors():
    with pytest.raises(UserError):
        parse(TEACHER, "--lr", "0")


def test_the_page_of_options_is_current():
    made = subprocess.run(
        [sys.executable, "-m", "support.options_page"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert made == (ROOT / "docs" / "options.md").read_text()
    assert all(f"`--{option.name}`" in made for table in SCRIPTS.values() for option in table)
