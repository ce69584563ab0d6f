"""Distil a teacher into a generator of one or a few steps with DMD2 (Yin et al. 2024). Generator and guidance train in turns."""

from support.config import DMD2, UserError, exit_on_error, parse_args

args = exit_on_error(parse_args, DMD2, __doc__) if __name__ == "__main__" else None  # before torch: --help answers at once

import copy
import math
import sys
from inspect import signature

import torch
from torch import nn

import checkpoint
from data import Batches, check_classes, load_dataset
from guidance import GuidanceModel
from sampling import grid_noise, heun_sampler, spread_levels, student_sampler
from support.device import autocast, choose_device, compile_networks
from support.dry_run import DryRun, load_teacher
from support.parallel import broadcast, micro_batches, rank, rows_of, std, total
from support.runs import Run
from support.training import BadSteps, accumulate, adamw, build_optimizer, lr_factor, optimizer_step, update_ema
from unified_model import UnifiedModel


def main(args, run=None):
    """Trains with the options `args` from `parse_args(DMD2, ...)`, as `run` or a new `Run`. Returns the exit status."""
    # ---- setup ----------------------------------------------------------------------------------------------------------
    run = run or (DryRun if args.dry_run else Run)(args, "dmd2")
    args = run.args  # completed by the options of the run that is resumed, if any
    device = choose_device(args)
    torch.manual_seed(args.seed)
    teacher_state = (load_teacher if args.dry_run else checkpoint.load_teacher)(args.teacher_checkpoint)
    sigmas = args.student_sigmas or spread_levels(args.student_steps, args.conditioning_sigma, args.sigma_min, args.rho)
    teacher = checkpoint.network(teacher_state, args.teacher_checkpoint, device)
    if outside := [sigma for sigma in sigmas if not teacher.sigma_min <= sigma <= teacher.sigma_max]:
        option = "student_sigmas" if args.student_sigmas else "conditioning_sigma"
        known = f"the teacher knows noise from {teacher.sigma_min:.2g} to {teacher.sigma_max:.4g}"
        raise UserError(f"--{option} {outside[0]}: {known}")
    dataset = load_dataset(args.dataset, args.data_dir, teacher.config["img_resolution"], teacher.config["img_channels"], device)
    class_names = check_classes(args, dataset, teacher_state)
    batches = Batches(dataset, args.batch_size, args.seed)

    # A resumed head keeps the group width of its norms, even if the teacher's is different.
    groups = (run.resumed or {}).get("gan_channels_per_group") or teacher.config.get("channels_per_group", 16)
    options = {name: getattr(args, name) for name in signature(GuidanceModel).parameters if hasattr(args, name)}
    processes = dict(randint=rows_of(torch.randint), randn=rows_of(torch.randn), total=total)  # same for any number
    guidance = GuidanceModel(teacher, sigma_data=teacher.sigma_data, gan_channels_per_group=groups, **options, **processes)
    model = UnifiedModel(guidance, student_sigmas=sigmas).to(device)
    broadcast(model)
    model.eval()  # this only turns dropout off, in teacher, generator and fake_unet alike
    generator = model.feedforward_model
    ema = copy.deepcopy(generator).requires_grad_(False) if args.ema_decay else None
    heads = list(guidance.cls_pred_branch.parameters()) if args.gan_classifier else []
    optimizer_gan = adamw(heads, args.gan_lr) if args.gan_lr else None
    optimizer_generator = build_optimizer(args.optimizer, generator, args.generator_lr)
    # A fake_unet per level of the student. One for all would learn the mixture of their images, and each level alone could drift.
    fake_unets = nn.ModuleList([guidance.fake_unet, *(copy.deepcopy(guidance.fake_unet) for _ in sigmas[1:])])
    optimizer_guidance = build_optimizer(args.optimizer, fake_unets, args.guidance_lr, [] if optimizer_gan else heads)
    compile_networks(args, teacher, *fake_unets, generator)

    parts = {
        "feedforward_model_state_dict": generator,
        "ema_state_dict": ema,
        "guidance_fake_unet_state_dict": fake_unets[0],
        "optimizer_generator_state_dict": optimizer_generator,
        "optimizer_guidance_state_dict": optimizer_guidance,
    }
    parts |= {f"guidance_fake_unet_{level}_state_dict": net for level, net in enumerate(fake_unets) if level}
    if args.gan_classifier:
        parts["guidance_cls_state_dict"] = guidance.cls_pred_branch
    if optimizer_gan:
        parts["optimizer_gan_state_dict"] = optimizer_gan
    facts = dict(model_config=generator.config, class_names=class_names, student_sigmas=sigmas, gan_channels_per_group=groups)
    run.start(device, batches, parts, **facts)
    del teacher_state  # mainly to free its optimizer's moments
    logger = run.logger
    bad_steps = BadSteps(args.max_bad_steps, device)
    logger.message(f"{sum(p.numel() for p in generator.parameters()) / 1e6:.1f} M parameters, {2 + len(sigmas)} networks, {device}")
    grid = [part.to(device) for part in grid_noise(generator.label_dim, dataset.images.shape[1:], args.seed)]
    with autocast(args, device):
        teacher_grid = None if args.dry_run or rank() else heun_sampler(teacher, *grid)  # only rank 0 draws samples
    seen = None  # intermediate results of the latest generator turn

    # ---- loop -----------------------------------------------------------------------------------------------------------
    while run.goes_on():
        real_images, labels = next(batches)  # generated images get the labels of real ones, and so their class proportions
        noise = torch.randn_like(real_images)
        # The student's levels take turns: one has the guidance turns up to the next generator turn, and then that.
        level = (run.step - 1) // args.dfake_gen_update_ratio % len(sigmas)
        guidance.fake_unet = fake_unets[level]
        factor = lr_factor(run.step, args.lr_warmup_steps, args.lr_decay, args.step_number)

        # Generator turn, on every dfake_gen_update_ratio-th step: distribution matching, and the GAN loss if there are heads.
        generator_updates = run.step % args.dfake_gen_update_ratio == 0
        metrics, fake_images = {"real_std": real_images.std(0, correction=0).mean()}, []
        for z, y in micro_batches(args.grad_accum, noise, labels):
            if generator_updates:
                with autocast(args, device):
                    loss_dict, seen, images = model.generator_turn(z, y, level)
                loss = loss_dict["loss_dm"]
                if args.gan_classifier:
                    loss = loss + args.gen_cls_loss_weight * loss_dict["gen_cls_loss"]
                (loss / args.grad_accum).backward()
                accumulate(metrics, loss_dict, args.grad_accum)
                accumulate(metrics, {name: seen[name] for name in ("dmtrain_gradient_norm", "fake_lag")}, args.grad_accum)
            else:
                with torch.no_grad(), autocast(args, device):
                    images = model.generate_at(z, y, level)
            fake_images.append(images)
        norms = {}
        if generator_updates:
            norms["generator_grad_norm"] = optimizer_step(optimizer_generator, args.generator_lr * factor, args.clip_grad_norm)
            metrics["fake_std"] = std(torch.cat(fake_images)).mean()

        # Guidance turn, on every step: fake_unet learns to denoise generated images, the heads to tell them from real ones.
        updates = 0 if args.alternate_turns and generator_updates else args.guidance_updates
        for _ in range(updates):
            for fake, (y, real) in zip(fake_images, micro_batches(args.grad_accum, labels, real_images), strict=True):
                with autocast(args, device):
                    loss_dict, logits = model.guidance_turn(fake, y, real, y)
                loss = loss_dict["loss_fake_mean"]
                if args.gan_classifier:
                    loss = loss + args.cls_loss_weight * loss_dict["guidance_cls_loss"]
                (loss / args.grad_accum).backward()
                accumulate(metrics, loss_dict | logits, args.grad_accum * updates)
            most = args.clip_grad_norm if args.clip_guidance else math.inf
            norms["guidance_grad_norm"] = optimizer_step(optimizer_guidance, args.guidance_lr * factor, most)
            if optimizer_gan:
                norms["gan_grad_norm"] = optimizer_step(optimizer_gan, args.gan_lr * factor, most)

        if ema and generator_updates:
            # At a constant learning rate the weights fluctuate, so the average covers many updates, from early on.
            update_ema(ema, generator, args.ema_decay, run.step // args.dfake_gen_update_ratio + 1, ramp=2)
        run.step += 1

        bad_steps.add(norms)
        if run.step % args.log_every == 0 or run.done:
            bad_steps.check(run.step, args.output_dir, f"{args.sigma_min} to {args.sigma_max}")
        logger.log(run.step, metrics | norms)
        if logger.wants_samples(run.step):
            with torch.no_grad(), autocast(args, device):
                student_grid = student_sampler(ema or generator, *grid, sigmas)
            logger.samples(run.step, teacher_grid, student_grid, columns=8)
        if seen and logger.wandb_wants("images", run.step):
            logger.images(run.step, seen["dmtrain_noisy"], seen["dmtrain_pred_real"], seen["dmtrain_pred_fake"])
        run.save_if_due()

    return run.finish()


if __name__ == "__main__":
    sys.exit(exit_on_error(main, args))
