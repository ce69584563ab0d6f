"""Distil a teacher into a generator of one or a few steps with DMD2 (Yin et al. 2024)."""

import copy
import math
from itertools import chain

import torch

import checkpoint
from data import DATA, READERS, Batches, check_classes, describe, load_dataset, subset, without_images
from guidance import GuidanceModel, relative_errors
from objectives import F_DIVERGENCES
from run import RUN, Run
from sampling import grid_noise, heun_sampler, random_stream, student_sampler
from support.device import MACHINE, autocast, choose_device, compile_networks
from support.images import to_float
from support.logger import LOGGING, WANDB
from support.optimizers import OPTIMIZATION, adamw, build_optimizer, lr_factor, optimizer_step, update_ema
from support.options import Option, choice, count, flag, noise_level, number, parse_args, path, positive, share
from support.script import UserError, as_user_error, run_script
from unified_model import UnifiedModel

GUIDANCE = {  # these have the names of GuidanceModel's arguments
    "noise levels": [
        Option("num_train_timesteps", 1000, number(2, whole=True), "noise levels in the schedule"),
        Option("schedule", "karras", choice("karras", "flow"), "EDM's, or even in flow matching's time"),
        Option("sigma_min", 0.002, noise_level, "lowest noise level of the schedule"),
        Option("sigma_max", 80.0, noise_level, "highest noise level of the schedule"),
        Option("rho", 7.0, number(0.1), "shape of karras (EDM eq. 5)"),
        Option("shift", 1.0, positive, "of flow; above 1 moves levels to more noise (SD3)"),
        Option("min_step_percent", 0.02, share, "the distribution-matching loss draws from this share of the schedule"),
        Option("max_step_percent", 0.98, share, "... up to this share"),
    ],
    "objective": [
        Option("objective", "dmd", choice("dmd", "sid"), "of the generator: dmd, or score identity distillation (sid)"),
        Option("sid_alpha", 1.0, number(), "alpha of --objective sid; its papers use 1.0 and 1.2"),
        Option("f_divergence", "rkl", choice(*F_DIVERGENCES), "what dmd minimises; all but rkl need --gan_classifier"),
    ],
    "GAN on real images (DMD2 section 4.3)": [
        Option("gan_classifier", False, flag, "add the GAN loss"),
        Option("gan_features", "fake", choice("fake", "teacher"), "whose features the heads see"),
        Option("gan_resolutions", None, count, "resolutions of these, a head each; default: the coarsest alone", "+"),
    ],
}
OPTIONS = {
    "data": [
        DATA[0]._replace(parse=choice(*READERS, "none"), help="the data set; none: only labels, which need no GAN"),
        DATA[1]._replace(help=DATA[1].help + "; for none: a file with the number of images per class"),
        Option("teacher_checkpoint", "./log/checkpoints/teacher/teacher_final.pt", path, "to distil"),
    ],
    "the two time scales": [
        Option("dfake_gen_update_ratio", 10, count, "iterations per generator update"),
        Option("generator_lr", 2e-6, positive, "learning rate of the generator"),
        Option("guidance_lr", 2e-6, positive, "learning rate of the guidance model"),
        Option("clip_guidance", True, flag, "apply clip_grad_norm to the guidance model too"),
        Option("ema_decay", [0.0], share, "decays of the generator's averages; the first is sampled; 0: none", "+"),
        *OPTIMIZATION,
    ],
    "generator": [
        Option("generator_checkpoint", None, path, "another teacher that it starts as, such as a smaller one"),
        Option("conditioning_sigma", 80.0, noise_level, "noise level at which the generator is called"),
        Option("student_sigmas", None, noise_level, "those of several steps, descending, in place of that one", "+"),
    ],
    **GUIDANCE,
    "training with the GAN": [
        Option("gan_lr", None, positive, "learning rate of the heads; default: guidance_lr"),
        Option("gen_cls_loss_weight", 3e-3, number(0), "weight of the GAN loss in the generator's loss"),
        Option("cls_loss_weight", 1e-2, number(0), "weight of the GAN loss in the guidance model's loss"),
    ],
    "run": [Option("output_dir", "./log/checkpoints/dmd2", path, "where checkpoints, metrics and samples go"), *RUN],
    "machine": MACHINE,
    "log": LOGGING,
    "Weights & Biases": WANDB,
}


def build_model(args, teacher, device):
    """The generator and its guidance. Raises UserError for options `args` that do not fit the networks."""
    if args.dataset == "none" and args.gan_classifier:
        raise UserError("--dataset none: --gan_classifier needs real images")
    generator = None
    if file := args.generator_checkpoint:
        state, source = checkpoint.load_teacher(file, "generator_checkpoint"), f"--generator_checkpoint {file}"
        checkpoint.check_same_images(source, state["model_config"], teacher.config, "the teacher's")
        generator = checkpoint.network(state, file, device)
    sigmas = args.student_sigmas or [args.conditioning_sigma]
    student = generator or teacher  # as which it starts
    if outside := [sigma for sigma in sigmas if not student.sigma_min <= sigma <= student.sigma_max]:
        option = "student_sigmas" if args.student_sigmas else "conditioning_sigma"
        known = f"the network knows noise from {student.sigma_min:.2g} to {student.sigma_max:.4g}"
        raise UserError(f"--{option} {outside[0]}: {known}")
    chosen = {option.name: getattr(args, option.name) for option in chain(*GUIDANCE.values())}
    with as_user_error("the options"):
        guidance = GuidanceModel(teacher, sigma_data=teacher.sigma_data, prediction=teacher.prediction, **chosen)
        model = UnifiedModel(guidance, student_sigmas=sigmas, generator=generator)
    return model.to(device).eval()  # turns dropout off, in all its networks alike


def warn_without_effect(args):
    """Prints a line if options were changed that do nothing beside the others."""
    idle = {
        "rho": args.schedule == "flow",
        "shift": args.schedule == "karras",
        "sid_alpha": args.objective == "dmd",
        "conditioning_sigma": args.student_sigmas is not None,
        **dict.fromkeys(["gan_features", "gan_resolutions", "gan_lr"], not args.gan_classifier),
        **dict.fromkeys(["gen_cls_loss_weight", "cls_loss_weight"], not args.gan_classifier),
    }
    changed = [o.name for o in chain(*OPTIONS.values()) if getattr(args, o.name) != o.default]
    if names := [f"--{name}" for name in changed if idle.get(name)]:
        print(f"without effect beside the other options: {', '.join(names)}")


def warn_if_misread(args, teacher, dataset):
    """Prints a line if the teacher denoises real images worse than a trivial guess does."""
    some = subset(dataset, torch.linspace(0, len(dataset.labels) - 1, 16).long())
    images = to_float(some.images.to(some.labels.device))
    errors = relative_errors(teacher, images, some.labels, generator=random_stream(0, 0))
    if worse := ", ".join(f"{sigma}" for sigma, error in errors.items() if not error < 1):
        where = f"--teacher_checkpoint {args.teacher_checkpoint}: at sigma {worse}"
        print(f"{where} it denoises worse than a trivial guess; does it know other images, or is it misread?")


def main(argv=None):
    """Trains with the options in `argv`, by default those of the command line. Returns the exit status."""
    # ---- setup ------------------------------------------------------------------------------------------------------
    run = Run(parse_args(OPTIONS, __doc__, argv), OPTIONS, "dmd2")
    args = run.args  # completed by the options of the run that is resumed, if any
    warn_without_effect(args)
    device = choose_device(args)
    torch.manual_seed(args.seed)
    teacher_state = checkpoint.load_teacher(args.teacher_checkpoint)
    teacher = checkpoint.network(teacher_state, args.teacher_checkpoint, device)
    model = build_model(args, teacher, device)
    guidance, generator, sigmas = model.guidance_model, model.feedforward_model, model.student_sigmas
    side, channels = teacher.config["img_resolution"], teacher.config["img_channels"]
    has_images = args.dataset != "none"
    if has_images:
        dataset = load_dataset(args.dataset, args.data_dir, side, channels, device)
    else:
        class_names = checkpoint.class_names(teacher_state, teacher.label_dim)
        dataset = without_images(args.data_dir, class_names, (channels, side, side), args.batch_size, device)
    class_names = check_classes(f"--teacher_checkpoint {args.teacher_checkpoint}", dataset, teacher_state, args.dataset)
    if has_images and not run.step:  # before the teacher is compiled, as each batch size takes a compilation of its own
        warn_if_misread(args, teacher, dataset)
    # The GAN's real images are mirrored if the teacher's were, or its heads would learn that mirrored means generated.
    batches = Batches(dataset, args.batch_size, args.seed, hflip=bool(teacher_state["config"].get("hflip")))

    averages = {decay: copy.deepcopy(generator).requires_grad_(False) for decay in args.ema_decay if decay}
    ema = next(iter(averages.values()), None)
    discriminator = guidance.cls_pred_branch if args.gan_classifier else None
    fake_unet = model.fake_unets if len(sigmas) > 1 else guidance.fake_unet  # one alone is saved without an index
    optimizer_generator = build_optimizer(args.optimizer, generator, args.generator_lr)
    optimizer_guidance = build_optimizer(args.optimizer, fake_unet, args.guidance_lr)
    gan_lr = args.gan_lr or args.guidance_lr
    optimizer_gan = adamw(discriminator.parameters(), gan_lr, betas=(0.5, 0.99)) if discriminator else None
    compile_networks(args, teacher, generator, *model.fake_unets)

    with run.start(  # networks and optimizers are saved and restored, each as NAME_state_dict
        device,
        batches,
        {"model_config": generator.config, "class_names": class_names, "student_sigmas": sigmas},
        feedforward_model=generator,
        ema=ema,
        guidance_fake_unet=fake_unet,
        guidance_cls=discriminator,
        optimizer_generator=optimizer_generator,
        optimizer_guidance=optimizer_guidance,
        optimizer_gan=optimizer_gan,
        **{f"ema_{decay}": average for decay, average in averages.items() if average is not ema},
    ) as logger:
        del teacher_state  # mainly to free its optimizer's moments
        size = sum(p.numel() for p in generator.parameters()) / 1e6
        data = describe(dataset._replace(class_names=class_names)) if has_images else "no real images"
        logger.message(f"{size:.1f} M parameters, {2 + len(sigmas)} networks, {data}, {device}")
        grid = [part.to(device) for part in grid_noise(generator.label_dim, dataset.images.shape[1:], args.seed)]
        teacher_grid = None  # drawn when it is first needed
        log_dict = None  # noised images, and both predictions, of the latest generator turn

        # ---- loop ---------------------------------------------------------------------------------------------------
        while run.goes_on():
            # Generated images get the labels of real ones: the same class proportions.
            real_images, labels = next(batches)
            noise = torch.randn_like(real_images)
            parts = [batch.chunk(args.grad_accum) for batch in (noise, labels, real_images)]
            micro_batches = list(zip(*parts, strict=True))
            lr_scale = lr_factor(run.step, args.lr_warmup_steps, args.lr_decay, args.step_number)
            update_generator = run.step % args.dfake_gen_update_ratio == 0
            generator_updates = math.ceil(run.step / args.dfake_gen_update_ratio)  # so far
            student_step = generator_updates % len(sigmas)  # its fake_unet trains until the generator is updated there
            fake_images, metrics = [], {}

            # Generator turn, on every dfake_gen_update_ratio-th step: distribution matching (DMD2 eq. 1), GAN loss.
            if update_generator:
                for z, y, _ in micro_batches:
                    with autocast(args, device):
                        loss_dict, log_dict, images = model.generator_turn(z, y, student_step)
                    loss = loss_dict["loss_dm"] + args.gen_cls_loss_weight * loss_dict.get("gen_cls_loss", 0.0)
                    (loss / args.grad_accum).backward()
                    logger.add(loss_dict)
                    fake_images.append(images)
                lr = args.generator_lr * lr_scale  # optimizer_step sets it, clips, steps, and clears the gradients
                metrics["generator_grad_norm"] = optimizer_step(optimizer_generator, lr, args.clip_grad_norm)
                for decay, average in averages.items():
                    # ramp=2: early on, the average covers the last half of the updates, since the weights fluctuate.
                    update_ema(average, generator, decay, generator_updates + 1, ramp=2)
                metrics["fake_std"] = torch.cat(fake_images).std(0, correction=0).mean()
                if has_images:  # beside it a collapse shows
                    metrics["real_std"] = real_images.std(0, correction=0).mean()
            else:
                with torch.no_grad(), autocast(args, device):
                    fake_images = [model.generate_at(z, y, student_step) for z, y, _ in micro_batches]

            # Guidance turn: fake_unet learns to denoise these images, the heads to tell them from real ones.
            for images, (_, y, real) in zip(fake_images, micro_batches, strict=True):
                with autocast(args, device):
                    loss_dict, logits = model.guidance_turn(images, y, real, y, student_step)
                loss = loss_dict["loss_fake_mean"] + args.cls_loss_weight * loss_dict.get("guidance_cls_loss", 0.0)
                (loss / args.grad_accum).backward()
                logger.add(loss_dict | logits)
            max_norm = args.clip_grad_norm if args.clip_guidance else math.inf
            metrics["guidance_grad_norm"] = optimizer_step(optimizer_guidance, args.guidance_lr * lr_scale, max_norm)
            if discriminator:
                metrics["gan_grad_norm"] = optimizer_step(optimizer_gan, gan_lr * lr_scale, max_norm)

            run.step += 1
            logger.log(run.step, metrics)
            if logger.wants_samples(run.step):
                with torch.no_grad(), autocast(args, device):
                    if teacher_grid is None:
                        logger.message(f"drawing {len(grid[0])} images of the teacher, 35 network evaluations each")
                        teacher_grid = heun_sampler(teacher, *grid)
                    logger.grid(run.step, "samples", teacher_grid, student_sampler(ema or generator, *grid, sigmas))
                if log_dict:
                    logger.grid(run.step, "images", *log_dict.values())
            run.save_if_due()
    return run.stop.exit_status


if __name__ == "__main__":
    run_script(main)
