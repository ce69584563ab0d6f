"""Train the teacher: a class-conditional denoiser, by EDM's loss (Karras et al. 2022). DMD2 distils its averaged weights."""

from config import TEACHER, UserError, parse_args, run


def main():
    args = parse_args(TEACHER, __doc__)

    import copy  # heavy modules come after the options, so that --help and mistakes answer at once
    import sys
    from pathlib import Path

    import torch

    import checkpoint
    from data import Batches, load_dataset
    from logger import Logger, public
    from model import SimpleUNet, denoising_loss
    from parallel import broadcast, micro_batches, rank
    from sampling import class_noise, heun_sampler, random_stream
    from training import (
        BadSteps,
        Stop,
        accumulate,
        adamw,
        autocast,
        choose_device,
        compile_networks,
        load_optimizer,
        lr_factor,
        optimizer_step,
        update_ema,
    )

    # ---- setup ----------------------------------------------------------------------------------------------------------
    device = choose_device(args)
    torch.manual_seed(args.seed)
    resumed = None
    if args.resume_from_checkpoint:
        resume_path, resumed = checkpoint.resume(args.resume_from_checkpoint, args.output_dir, "teacher")

    dataset = load_dataset(args.dataset, args.data_dir, args.img_resolution, args.img_channels, device)
    hflip = args.dataset in ("cifar10", "folder") if args.hflip is None else args.hflip
    batches = Batches(dataset, args.batch_size, args.seed, hflip)
    num_classes = len(dataset.class_names)
    if args.label_dim not in (None, num_classes):
        raise UserError(f"--label_dim {args.label_dim}: the data set has {num_classes} classes")

    net = SimpleUNet(
        img_resolution=args.img_resolution,
        img_channels=dataset.images.shape[1],
        label_dim=num_classes,
        model_channels=args.model_channels,
        channel_mult=args.channel_mult,
        num_blocks=args.num_blocks,
        attn_resolutions=args.attn_resolutions,
        dropout=args.dropout,
        sigma_data=args.sigma_data,
        channels_per_group=args.channels_per_group,
    ).to(device, memory_format=torch.channels_last)
    broadcast(net)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = adamw(net.parameters(), args.lr)
    compile_networks(args, net)
    step = 0

    if resumed:
        if checkpoint.kind(resumed) != "teacher" or resumed["model_config"] != net.config:
            raise UserError(f"checkpoint {resume_path}: not a teacher with this network ({net.config})")
        net.load_state_dict(resumed["model_state_dict"])
        ema.load_state_dict(resumed["ema_state_dict"])
        load_optimizer(optimizer, resumed["optimizer_state_dict"])
        step, batches.images_seen = resumed["step"], resumed["images_seen"]
        checkpoint.set_random_state(resumed["random_state"], device)

    if rank():
        # Dropout alone draws from torch's own stream: in each process differently.
        torch.manual_seed(args.seed + 1000003 * step + rank())

    def save(name):
        if rank():
            return
        path = Path(args.output_dir) / name
        state = {
            "model_state_dict": net.state_dict(),
            "ema_state_dict": ema.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
            "step": step,
            "model_config": net.config,
            "config": public(args),
            "class_names": dataset.class_names,
            "versions": versions,
            "wandb_run_id": logger.wandb_run.id if logger.wandb_run else None,
            "random_state": checkpoint.random_state(device),
            "images_seen": batches.images_seen,
        }
        checkpoint.save(path, state)
        logger.saved(path)

    logger = Logger(args, "teacher", step, resumed.get("wandb_run_id") if resumed else None)
    versions = checkpoint.versions()
    if step >= args.step_number:
        logger.message(f"nothing left to train: {resume_path} is at step {step}; a larger --step_number goes on")
    bad_steps, stop = BadSteps(args.max_bad_steps, device), Stop(args.max_minutes)
    logger.message(f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters, {len(dataset.labels)} images, {device}")
    grid_noise, grid_labels = class_noise(range(min(num_classes, 10)), 8, dataset.images.shape[1:], args.seed)
    grid_noise, grid_labels = grid_noise.to(device), grid_labels.to(device)
    del resumed

    # ---- loop -----------------------------------------------------------------------------------------------------------
    while step < args.step_number and not stop.due:
        images, labels = next(batches)
        random = random_stream(args.seed, 10**9 + step, device)  # far from the numbers of epochs, which shuffle by `seed` too
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

        lr = args.lr * lr_factor(step, args.lr_warmup_steps, args.lr_decay, args.step_number)
        norms = {"grad_norm": optimizer_step(optimizer, lr, args.clip_grad_norm)}
        step += 1
        update_ema(ema, net, args.ema_decay, step)

        bad_steps.add(norms)
        if step % args.log_every == 0 or step == args.step_number:
            bad_steps.check(step, args.output_dir, f"{sigma.min():.3g} to {sigma.max():.3g}")
        logger.log(step, metrics | norms | {"lr": lr})
        if logger.wants_samples(step):
            logger.samples(step, heun_sampler(ema, grid_noise, grid_labels), columns=8)
        if logger.wandb_wants("images", step):
            logger.images(step, x, noisy, denoised.detach())
        if step % args.save_every == 0:
            save(f"teacher_checkpoint_step_{step}.pt")

    if step < args.step_number:
        save(f"teacher_checkpoint_step_{step}.pt")
        logger.message(f"stopped after step {step}; go on with --resume_from_checkpoint latest")
        logger.close()
        sys.exit(stop.exit_status)
    save("teacher_final.pt")
    logger.close()


if __name__ == "__main__":
    run(main)
