"""Train the teacher, a denoiser with or without classes, with EDM's loss (Karras et al. 2022). DMD2 uses its averaged weights."""

from support.config import TEACHER, exit_on_error, parse_args

args = exit_on_error(parse_args, TEACHER, __doc__) if __name__ == "__main__" else None  # before torch: --help answers at once

import copy
import sys

import torch

from data import Batches, check_label_dim, load_dataset
from model import SimpleUNet, denoising_loss, memory_layout
from sampling import grid_noise, heun_sampler, random_stream
from support.device import autocast, choose_device, compile_networks
from support.dry_run import DryRun
from support.parallel import broadcast, micro_batches, rank
from support.runs import Run
from support.training import BadSteps, accumulate, build_optimizer, lr_factor, optimizer_step, update_ema


def main(args):
    """Trains with the options `args` from `parse_args(TEACHER, ...)`. Returns the exit status."""
    # ---- setup ----------------------------------------------------------------------------------------------------------
    run = (DryRun if args.dry_run else Run)(args, "teacher")
    args = run.args  # completed by the options of the run that is resumed, if any
    device = choose_device(args)
    torch.manual_seed(args.seed)
    dataset = load_dataset(args.dataset, args.data_dir, args.img_resolution, args.img_channels, device)
    class_names = check_label_dim(args, dataset)
    hflip = args.dataset in ("cifar10", "folder") if args.hflip is None else args.hflip
    batches = Batches(dataset, args.batch_size, args.seed, hflip)

    net = SimpleUNet(
        img_resolution=args.img_resolution,
        img_channels=dataset.images.shape[1],
        label_dim=len(class_names),
        model_channels=args.model_channels,
        channel_mult=args.channel_mult,
        num_blocks=args.num_blocks,
        attn_resolutions=args.attn_resolutions,
        dropout=args.dropout,
        sigma_data=args.sigma_data,
        channels_per_group=args.channels_per_group,
    ).to(device, memory_format=memory_layout(device))
    broadcast(net)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = build_optimizer(args.optimizer, net, args.lr)
    compile_networks(args, net)

    parts = {"model_state_dict": net, "ema_state_dict": ema, "optimizer_state_dict": optimizer}
    run.start(device, batches, parts, model_config=net.config, class_names=class_names)
    logger = run.logger
    if rank():
        # Only dropout draws from torch's own stream. It has to differ between processes.
        torch.manual_seed(args.seed + 1000003 * run.step + rank())
    bad_steps = BadSteps(args.max_bad_steps, device)
    size = sum(p.numel() for p in net.parameters()) / 1e6
    attention = ", ".join(str(side) for side in net.feature_channels if side in args.attn_resolutions) or "no resolution"
    data = f"{len(dataset.labels)} images, {len(class_names) or 'no'} classes"
    logger.message(f"{size:.1f} M parameters, self-attention at {attention}, {data}, {device}")
    grid = [part.to(device) for part in grid_noise(net.label_dim, dataset.images.shape[1:], args.seed)]

    # ---- loop -----------------------------------------------------------------------------------------------------------
    while run.goes_on():
        images, labels = next(batches)
        random = random_stream(args.seed, 10**9 + run.step, device)  # far from the epochs' numbers, which shuffle by `seed` too
        # EDM table 1: ln(sigma) ~ N(P_mean, P_std^2)
        sigmas = (args.P_mean + args.P_std * torch.randn(len(images), generator=random, device=device)).exp()
        noise = torch.randn(images.shape, generator=random, device=device)
        metrics = {}
        for x, y, sigma, n in micro_batches(args.grad_accum, images, labels, sigmas, noise):
            noisy = x + sigma[:, None, None, None] * n
            with autocast(args, device):
                denoised = net(noisy, sigma, y)
            loss = denoising_loss(denoised, x, sigma, args.sigma_data)
            (loss / args.grad_accum).backward()
            accumulate(metrics, {"loss": loss}, args.grad_accum)

        lr = args.lr * lr_factor(run.step, args.lr_warmup_steps, args.lr_decay, args.step_number)
        norms = {"grad_norm": optimizer_step(optimizer, lr, args.clip_grad_norm)}
        run.step += 1
        update_ema(ema, net, args.ema_decay, run.step)

        bad_steps.add(norms)
        if run.step % args.log_every == 0 or run.done:
            bad_steps.check(run.step, args.output_dir, f"{sigma.min():.3g} to {sigma.max():.3g}")
        logger.log(run.step, metrics | norms | {"lr": lr})
        if logger.wants_samples(run.step):
            with autocast(args, device):
                sample_grid = heun_sampler(ema, *grid)
            logger.samples(run.step, sample_grid, columns=8)
        if logger.wandb_wants("images", run.step):
            logger.images(run.step, x, noisy, denoised.detach())
        run.save_if_due()

    return run.finish()


if __name__ == "__main__":
    sys.exit(exit_on_error(main, args))
