"""Train the teacher, a denoiser with or without classes, with EDM's loss (Karras et al. 2022)."""

import copy

import torch

from data import DATA, Batches, describe, load_dataset
from model import SimpleUNet, denoising_loss
from run import RUN, Run
from sampling import grid_noise, heun_sampler
from support.device import MACHINE, autocast, choose_device, compile_networks
from support.logger import LOGGING, WANDB
from support.optimizers import OPTIMIZATION, build_optimizer, lr_factor, optimizer_step, update_ema
from support.options import Option, choice, count, flag, number, parse_args, path, positive, share
from support.script import UserError, as_user_error, run_script

NETWORK = [
    Option("img_resolution", 32, number(8, 64, whole=True), "side to which the images are resized"),
    Option("img_channels", None, number(1, 3, whole=True), "1 (grey) or 3; default: the data set's own (folder: 3)"),
    Option("label_dim", None, number(0, whole=True), "number of classes, 0: ignore labels; default: the data set's"),
    Option("model_channels", 128, number(8, whole=True), "base width of the network, a multiple of 8"),
    Option("channel_mult", [1, 2, 2, 2], count, "width at each resolution, in units of model_channels", "+"),
    Option("num_blocks", 2, count, "residual blocks at each resolution"),
    Option("attn_resolutions", None, count, "resolutions with self-attention; default: 16, where it occurs", "*"),
    Option("dropout", 0.1, number(0, 0.99), "dropout probability"),
    Option("sigma_data", 0.5, positive, "standard deviation of the data (EDM)"),
    Option("prediction", "edm", choice("edm", "flow"), "what the network predicts; flow: flow matching's velocity"),
]
OPTIONS = {
    "data": [*DATA, Option("hflip", None, flag, "mirror half of the images (default: for cifar10 and folder)")],
    "network": NETWORK,
    "optimization": [
        Option("lr", 1e-4, positive, "learning rate"),
        Option("ema_decay", 0.9999, share, "decay of the averaged weights, which are distilled; reached gradually"),
        Option("P_mean", None, number(), "mean of ln(sigma), or logit(t), in training; default: -1.2 (EDM), flow: 0"),
        Option("P_std", None, positive, "standard deviation of ln(sigma) in training; default: 1.2 (EDM), flow: 1"),
        *OPTIMIZATION,
    ],
    "run": [Option("output_dir", "./log/checkpoints/teacher", path, "where checkpoints, metrics and samples go"), *RUN],
    "machine": MACHINE,
    "log": LOGGING,
    "Weights & Biases": WANDB,
}


def check_label_dim(args, dataset):
    """The names of the classes that a teacher learns: those of the data set, or none with `--label_dim 0`."""
    ours = [] if args.label_dim == 0 else dataset.class_names
    if args.label_dim not in (None, len(ours)):
        raise UserError(f"--label_dim {args.label_dim}: the data set has {len(ours) or 'no'} classes (0: no labels)")
    if len(ours) == 1:
        raise UserError(f"{args.data_dir}: only one class ({ours[0]}); give two subfolders or more, or --label_dim 0")
    return ours


def build_network(args, img_channels, label_dim):
    """The teacher with the options `args`. Raises UserError for options that do not fit together."""
    if args.img_channels == 2:
        raise UserError("--img_channels must be 1 or 3, not 2")
    sides = [args.img_resolution >> level for level in range(len(args.channel_mult))]
    attends = [side for side in sides if side == 16] if args.attn_resolutions is None else args.attn_resolutions
    if missing := set(attends) - set(sides):
        known = ", ".join(map(str, sides))
        raise UserError(f"--attn_resolutions {max(missing)}: the network's resolutions are {known}")
    chosen = {option.name: getattr(args, option.name) for option in NETWORK}  # they have the constructor's names
    chosen |= {"img_channels": img_channels, "label_dim": label_dim, "attn_resolutions": attends}
    with as_user_error("the network's options"):
        return SimpleUNet(**chosen)


def main(argv=None):
    """Trains with the options in `argv`, by default those of the command line. Returns the exit status."""
    # ---- setup ------------------------------------------------------------------------------------------------------
    run = Run(parse_args(OPTIONS, __doc__, argv), OPTIONS, "teacher")
    args = run.args  # completed by the options of the run that is resumed, if any
    with torch.device("meta"):
        build_network(args, 1, 1)  # wrong options are told before the data are read
    device = choose_device(args)
    torch.manual_seed(args.seed)
    dataset = load_dataset(args.dataset, args.data_dir, args.img_resolution, args.img_channels, device)
    class_names = check_label_dim(args, dataset)
    default_mean, default_std = (-1.2, 1.2) if args.prediction == "edm" else (0.0, 1.0)  # t is logit-normal (SD3)
    args.P_mean = default_mean if args.P_mean is None else args.P_mean
    args.P_std = default_std if args.P_std is None else args.P_std
    args.hflip = args.dataset in ("cifar10", "folder") if args.hflip is None else args.hflip
    batches = Batches(dataset, args.batch_size, args.seed, args.hflip)

    net = build_network(args, dataset.images.shape[1], len(class_names)).to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = build_optimizer(args.optimizer, net, args.lr)
    compile_networks(args, net)

    facts = {"model_config": net.config, "class_names": class_names}
    # Networks and optimizers are saved and restored, each as NAME_state_dict.
    with run.start(device, batches, facts, model=net, ema=ema, optimizer=optimizer) as logger:
        size = sum(p.numel() for p in net.parameters()) / 1e6
        attention = ", ".join(map(str, net.config["attn_resolutions"])) or "no resolution"
        data = describe(dataset._replace(class_names=class_names))
        logger.message(f"{size:.1f} M parameters, self-attention at {attention}, {data}, {device}")
        grid = [part.to(device) for part in grid_noise(net.label_dim, dataset.images.shape[1:], args.seed)]

        # ---- loop ---------------------------------------------------------------------------------------------------
        while run.goes_on():
            images, labels = next(batches)
            # EDM table 1: ln(sigma) ~ N(P_mean, P_std^2). In flow matching ln(sigma) is the logit of t.
            sigmas = (args.P_mean + args.P_std * torch.randn(len(images), device=device)).exp()
            noisy = images + sigmas[:, None, None, None] * torch.randn_like(images)
            parts = [batch.chunk(args.grad_accum) for batch in (noisy, images, sigmas, labels)]
            lr = args.lr * lr_factor(run.step, args.lr_warmup_steps, args.lr_decay, args.step_number)
            for x, x0, sigma, y in zip(*parts, strict=True):
                with autocast(args, device):
                    denoised = net(x, sigma, y)
                loss = denoising_loss(denoised, x0, sigma, args.sigma_data, args.prediction)
                (loss / args.grad_accum).backward()
                logger.add({"loss": loss})

            metrics = {"grad_norm": optimizer_step(optimizer, lr, args.clip_grad_norm), "lr": lr}
            run.step += 1
            update_ema(ema, net, args.ema_decay, run.step)

            logger.log(run.step, metrics)
            if logger.wants_samples(run.step):
                logger.message(f"drawing {len(grid[0])} images, 35 network evaluations each")
                with autocast(args, device):
                    logger.grid(run.step, "samples", heun_sampler(ema, *grid))
                logger.grid(run.step, "images", x0, x, denoised.detach())
            run.save_if_due()
    return run.stop.exit_status


if __name__ == "__main__":
    run_script(main)
