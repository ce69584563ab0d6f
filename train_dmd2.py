"""Distil a teacher into a one-step generator by DMD2 (Yin et al. 2024): two time-scale updates of generator and guidance."""

from config import DMD2, UserError, parse_args, run


def main():
    args = parse_args(DMD2, __doc__)

    import copy  # heavy modules come after the options, so that --help and mistakes answer at once
    import sys
    from pathlib import Path

    import torch

    import checkpoint
    from data import Batches, load_dataset
    from guidance import GuidanceModel
    from logger import Logger, public
    from parallel import broadcast, micro_batches, own_rows, rank
    from sampling import class_noise, heun_sampler, one_step_sampler
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
    from unified_model import UnifiedModel

    # ---- setup ----------------------------------------------------------------------------------------------------------
    device = choose_device(args)
    torch.manual_seed(args.seed)
    teacher_state = checkpoint.load(args.teacher_checkpoint)
    if checkpoint.kind(teacher_state) != "teacher":
        raise UserError(f"--teacher_checkpoint {args.teacher_checkpoint}: a generator; it takes what train_teacher.py writes")
    resumed = None
    if args.resume_from_checkpoint:
        resume_path, resumed = checkpoint.resume(args.resume_from_checkpoint, args.output_dir, "dmd2")

    teacher = checkpoint.network(teacher_state, args.teacher_checkpoint, device)
    dataset = load_dataset(args.dataset, args.data_dir, teacher.config["img_resolution"], teacher.config["img_channels"], device)
    if len(dataset.class_names) != teacher.label_dim:
        raise UserError(
            f"--teacher_checkpoint {args.teacher_checkpoint}: knows {teacher.label_dim} classes; "
            f"the data set {args.dataset} has {len(dataset.class_names)}"
        )
    class_names, taught_on = teacher_state.get("class_names") or dataset.class_names, teacher_state["config"].get("dataset")
    numbers = [str(label) for label in range(teacher.label_dim)]  # the names that a ZIP gives its classes
    same_names = dataset.class_names == class_names
    if not same_names and ("folder" not in (args.dataset, taught_on) or numbers not in (dataset.class_names, class_names)):
        raise UserError(
            f"--teacher_checkpoint {args.teacher_checkpoint}: learnt {', '.join(class_names[:3])}, ... of {taught_on}; "
            f"the data set {args.dataset} has {', '.join(dataset.class_names[:3])}, ..."
        )
    batches = Batches(dataset, args.batch_size, args.seed)

    guidance = GuidanceModel(
        teacher,
        num_train_timesteps=args.num_train_timesteps,
        sigma_min=args.sigma_min,
        sigma_max=args.sigma_max,
        sigma_data=teacher.sigma_data,
        rho=args.rho,
        min_step_percent=args.min_step_percent,
        max_step_percent=args.max_step_percent,
        gan_classifier=args.gan_classifier,
        diffusion_gan=args.diffusion_gan,
        diffusion_gan_max_timestep=args.diffusion_gan_max_timestep,
    )
    model = UnifiedModel(guidance, args.conditioning_sigma).to(device)
    broadcast(model)
    model.eval()  # all that this changes is dropout: off for teacher, generator and fake_unet alike
    generator = model.feedforward_model
    ema = copy.deepcopy(generator).requires_grad_(False) if args.ema_decay else None
    optimizer_generator = adamw(generator.parameters(), args.generator_lr)
    optimizer_guidance = adamw([p for p in guidance.parameters() if p.requires_grad], args.guidance_lr)
    compile_networks(args, teacher, guidance.fake_unet, generator)
    step = 0

    if resumed:
        if checkpoint.kind(resumed) != "dmd2" or resumed["model_config"] != generator.config:
            raise UserError(f"checkpoint {resume_path}: not a generator with the teacher's network ({generator.config})")
        generator.load_state_dict(resumed["feedforward_model_state_dict"])
        guidance.fake_unet.load_state_dict(resumed["guidance_fake_unet_state_dict"])
        if args.gan_classifier != ("guidance_cls_state_dict" in resumed):
            how = "with" if "guidance_cls_state_dict" in resumed else "without"
            raise UserError(f"checkpoint {resume_path}: trained {how} --gan_classifier; go on from it {how} it")
        if args.gan_classifier:
            guidance.cls_pred_branch.load_state_dict(resumed["guidance_cls_state_dict"])
        if ema:
            ema.load_state_dict(resumed["ema_state_dict"] or resumed["feedforward_model_state_dict"])
        load_optimizer(optimizer_generator, resumed["optimizer_generator_state_dict"])
        load_optimizer(optimizer_guidance, resumed["optimizer_guidance_state_dict"])
        step, batches.images_seen = resumed["step"], resumed["images_seen"]
        checkpoint.set_random_state(resumed["random_state"], device)

    def save(name):
        if rank():
            return
        path = Path(args.output_dir) / name
        state = {
            "feedforward_model_state_dict": generator.state_dict(),
            "ema_state_dict": ema.state_dict() if ema else None,
            "guidance_fake_unet_state_dict": guidance.fake_unet.state_dict(),
            "optimizer_generator_state_dict": optimizer_generator.state_dict(),
            "optimizer_guidance_state_dict": optimizer_guidance.state_dict(),
            "step": step,
            "model_config": generator.config,
            "config": public(args),
            "class_names": class_names,
            "versions": versions,
            "wandb_run_id": logger.wandb_run.id if logger.wandb_run else None,
            "random_state": checkpoint.random_state(device),
            "images_seen": batches.images_seen,
        }
        if args.gan_classifier:
            state["guidance_cls_state_dict"] = guidance.cls_pred_branch.state_dict()
        checkpoint.save(path, state)
        logger.saved(path)

    logger = Logger(args, "dmd2", step, resumed.get("wandb_run_id") if resumed else None)
    versions = checkpoint.versions()
    if step >= args.step_number:
        logger.message(f"nothing left to train: {resume_path} is at step {step}; a larger --step_number goes on")
    bad_steps, stop = BadSteps(args.max_bad_steps, device), Stop(args.max_minutes)
    logger.message(f"{sum(p.numel() for p in generator.parameters()) / 1e6:.1f} M parameters, three networks, {device}")
    grid_noise, grid_labels = class_noise(range(min(generator.label_dim, 10)), 8, dataset.images.shape[1:], args.seed)
    grid_noise, grid_labels = grid_noise.to(device), grid_labels.to(device)
    del teacher_state, resumed  # their optimizers' moments, above all
    teacher_grid = heun_sampler(teacher, grid_noise, grid_labels)
    seen = None  # what the latest generator turn saw

    # ---- loop -----------------------------------------------------------------------------------------------------------
    while step < args.step_number and not stop.due:
        real_images, labels = next(batches)  # the generator is asked for the classes of real images, in their proportions
        noise = torch.randn_like(real_images)
        factor = lr_factor(step, args.lr_warmup_steps, args.lr_decay, args.step_number)

        # Generator turn, on every dfake_gen_update_ratio-th step: distribution matching, and looking real to the GAN head.
        generator_updates = step % args.dfake_gen_update_ratio == 0
        metrics, fake_images = {"real_std": own_rows(real_images).std(0, correction=0).mean()}, []
        for z, y in micro_batches(args.grad_accum, noise, labels):
            if generator_updates:
                with autocast(args, device):
                    loss_dict, seen, images = model.generator_turn(z, y)
                loss = loss_dict["loss_dm"]
                if args.gan_classifier:
                    loss = loss + args.gen_cls_loss_weight * loss_dict["gen_cls_loss"]
                (loss / args.grad_accum).backward()
                accumulate(metrics, loss_dict, args.grad_accum)
                accumulate(metrics, {"dmtrain_gradient_norm": seen["dmtrain_gradient_norm"]}, args.grad_accum)
            else:
                with torch.no_grad(), autocast(args, device):
                    images = model.generate(z, y)
            fake_images.append(images)
        norms = {}
        if generator_updates:
            norms["generator_grad_norm"] = optimizer_step(optimizer_generator, args.generator_lr * factor, args.clip_grad_norm)
            metrics["fake_std"] = torch.cat(fake_images).std(0, correction=0).mean()

        # Guidance turn, on every step: fake_unet learns what the generator makes, the head to tell it from real images.
        for fake, (y, real) in zip(fake_images, micro_batches(args.grad_accum, labels, real_images), strict=True):
            with autocast(args, device):
                loss_dict, logits = model.guidance_turn(fake, y, real, y)
            loss = loss_dict["loss_fake_mean"]
            if args.gan_classifier:
                loss = loss + args.cls_loss_weight * loss_dict["guidance_cls_loss"]
            (loss / args.grad_accum).backward()
            accumulate(metrics, loss_dict | logits, args.grad_accum)
        norms["guidance_grad_norm"] = optimizer_step(optimizer_guidance, args.guidance_lr * factor, args.clip_grad_norm)

        if ema and generator_updates:
            # The generator wanders at a constant learning rate: a long average, from early on.
            update_ema(ema, generator, args.ema_decay, step // args.dfake_gen_update_ratio + 1, ramp=2)
        step += 1

        bad_steps.add(norms)
        if step % args.log_every == 0 or step == args.step_number:
            bad_steps.check(step, args.output_dir, f"{args.sigma_min} to {args.sigma_max}")
        logger.log(step, metrics | norms)
        if logger.wants_samples(step):
            with torch.no_grad():
                student_grid = one_step_sampler(ema or generator, grid_noise, grid_labels, args.conditioning_sigma)
            logger.samples(step, teacher_grid, student_grid, columns=8)
        if seen and logger.wandb_wants("images", step):
            logger.images(step, seen["dmtrain_noisy"], seen["dmtrain_pred_real"], seen["dmtrain_pred_fake"])
        if step % args.save_every == 0:
            save(f"dmd2_checkpoint_step_{step}.pt")

    if step < args.step_number:
        save(f"dmd2_checkpoint_step_{step}.pt")
        logger.message(f"stopped after step {step}; go on with --resume_from_checkpoint latest")
        logger.close()
        sys.exit(stop.exit_status)
    save("dmd2_final.pt")
    logger.close()


if __name__ == "__main__":
    run(main)
