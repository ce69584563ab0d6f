"""Measure how fast this machine trains and samples, relative to its own ceiling. Tasks are timed in turn; medians are reported."""

from pathlib import Path

from support.config import BENCHMARK, exit_on_error, parse_args, writing

DIGITS = Path(__file__).parent / "configs" / "mnist0.yaml"
args = exit_on_error(parse_args, BENCHMARK, __doc__, None, DIGITS) if __name__ == "__main__" else None  # before torch

import copy
import json
import platform
import tempfile
from functools import partial
from inspect import signature

import torch
import torch.nn.functional as F

from data import Batches, Dataset
from guidance import GuidanceModel
from model import SimpleUNet, denoising_loss, memory_layout
from networks.diffusers_unet import DiffusersUNet
from sampling import heun_sampler
from support.costs import convolution_shapes, convolutions, count, shares_by_operator, time_in_turn
from support.device import autocast, choose_device, compile_networks
from support.logger import Logger
from support.training import build_optimizer, optimizer_step, update_ema
from unified_model import UnifiedModel


def main(args):
    """Runs the benchmark with the options `args` from `parse_args(BENCHMARK, ...)` and writes a JSON file."""
    device = choose_device(args)
    with writing(args.output), open(args.output, "a"):
        pass  # fail now, not after minutes of timing
    torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as args.output_dir:
        tasks, networks, batch = training_and_sampling(args, device)
        net = networks[0]
        shapes = convolution_shapes(net, batch)
        dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
        ceiling_tasks = convolutions(shapes, args.batch_size, device, dtype)
        tasks |= ceiling_tasks
        counts = {name: count(partial(task, lambda part: None)) for name, task in tasks.items()}
        by_operator = shares_by_operator(partial(tasks["teacher step"], lambda part: None), 5, device)
        compile_networks(args, *networks)
        seconds = time_in_turn(tasks, args.repeats, device)

    rates = {name: counts[name][0] / seconds[name].get("network", sum(seconds[name].values())) for name in tasks}
    ceilings = {
        "forward": max(counts[name][0] / 3 / seconds[name]["forward"] for name in ceiling_tasks),
        "training": max(rates[name] for name in ceiling_tasks),
    }
    rows = {}
    for name in tasks:
        trains = "clipping and optimizer" in seconds[name] or name in ceiling_tasks
        rows[name] = {
            "images_per_second": args.batch_size / sum(seconds[name].values()),
            "flops_per_second": rates[name],
            "share_of_ceiling": rates[name] / ceilings["training" if trains else "forward"],
            "peak_memory": counts[name][1],
            "seconds": seconds[name],
        }
    step = seconds["teacher step"]
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "network": net.config,
        "batch_size": args.batch_size,
        "precision": args.precision,
        "compile": args.compile,
        "ceilings": ceilings,
        "rows": rows,
        "operators": by_operator,
        "not_network": 1 - step["network"] / sum(step.values()),
        "speed_ratio": rows["one step"]["images_per_second"] / rows["Heun, 18 steps"]["images_per_second"],
    }
    report(result)
    with writing(args.output):
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {args.output}")


def training_and_sampling(args, device):
    """(tasks, networks, batch): the tasks do what the scripts do, on random images, and call `mark(part)` after each part."""
    names = signature(SimpleUNet).parameters.keys() - {"img_channels", "label_dim"}
    channels = args.img_channels or (1 if "mnist" in args.dataset else 3)
    classes = 10 if args.label_dim is None else args.label_dim
    net = SimpleUNet(img_channels=channels, label_dim=classes, **{name: getattr(args, name) for name in names})
    net = net.to(device, memory_format=memory_layout(device))
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    model = UnifiedModel(GuidanceModel(copy.deepcopy(ema))).to(device).eval()
    generator, fake_unet = model.feedforward_model, model.guidance_model.fake_unet
    optimizer = build_optimizer(args.optimizer, net, 1e-9)
    optimizer_generator, optimizer_guidance = (build_optimizer(args.optimizer, network, 1e-9) for network in (generator, fake_unet))

    size = (max(1000, args.batch_size), channels, args.img_resolution, args.img_resolution)
    pixels = torch.randint(256, size, dtype=torch.uint8, device=device)
    labels = torch.randint(max(1, classes), size[:1], device=device)
    batches = Batches(Dataset(pixels, labels, [str(i) for i in range(classes)]), args.batch_size, args.seed, args.hflip)
    images, labels = next(batches)
    noise = torch.randn_like(images)
    args.wandb = False
    logger = Logger(args)
    logger.bar.leave = False
    logger.bar.close()

    def teacher_step(mark):
        images, labels = next(batches)
        sigma = (args.P_mean + args.P_std * torch.randn(len(images), device=device)).exp()
        noisy = images + sigma[:, None, None, None] * torch.randn_like(images)
        mark("data and noise")
        with autocast(args, device):
            denoised = net(noisy, sigma, labels)
        loss = denoising_loss(denoised, images, sigma, args.sigma_data)
        loss.backward()
        mark("network")
        norm = optimizer_step(optimizer, 1e-9, args.clip_grad_norm)
        mark("clipping and optimizer")
        update_ema(ema, net, args.ema_decay, 1)
        mark("average")
        logger.log(batches.images_seen // args.batch_size, {"loss": loss, "grad_norm": norm, "lr": 1e-9})
        mark("logging")

    def dmd2_turn(turn, loss_name, optimizer, mark):
        with autocast(args, device):
            loss_dict = turn(noise, labels)[0]
        loss_dict[loss_name].backward()
        mark("network")
        optimizer_step(optimizer, 1e-9, args.clip_grad_norm)
        mark("clipping and optimizer")

    def peer_step(peer, optimizer, mark):
        with autocast(args, device):
            loss = F.mse_loss(peer(images, 1.0, labels), images)
        loss.backward()
        mark("network")
        optimizer.step()
        optimizer.zero_grad()
        mark("clipping and optimizer")

    @torch.inference_mode()
    def sampling(sampler, mark):
        with autocast(args, device):
            sampler(noise, labels)
        mark("network")

    tasks = {
        "teacher step": teacher_step,
        "guidance turn": partial(dmd2_turn, model.guidance_turn, "loss_fake_mean", optimizer_guidance),
        "generator turn": partial(dmd2_turn, model.generator_turn, "loss_dm", optimizer_generator),
        "one step": partial(sampling, model.generate),
        "Heun, 18 steps": partial(sampling, partial(heun_sampler, ema)),
    }
    if args.peers:
        peer = diffusers_unet(net.config, count(lambda: net(images, 1.0, labels))[0] / len(images), device)
        tasks["diffusers step"] = partial(peer_step, peer, torch.optim.AdamW(peer.parameters(), lr=1e-9))
        tasks["diffusers Heun"] = partial(sampling, partial(heun_sampler, peer))
    return tasks, [net, ema, generator, model.guidance_model.real_unet, fake_unet], (images, labels)


def report(result):
    ceilings, step = result["ceilings"], result["rows"]["teacher step"]["seconds"]
    print(f"{result['device']}, {result['machine']}, torch {result['torch']}, batch {result['batch_size']}, {result['precision']}")
    print(f"ceiling: {ceilings['forward'] / 1e9:.1f} GFLOP/s forward, {ceilings['training'] / 1e9:.1f} forward and backward")
    print(f"{'':34}{'images/s':>12}{'GFLOP/s':>12}{'of ceiling':>12}{'peak MB':>12}")
    for name, row in result["rows"].items():
        cells = [row["images_per_second"], row["flops_per_second"] / 1e9, row["share_of_ceiling"], row["peak_memory"] / 1e6]
        print(f"{name:34}" + "".join(f"{cell:12.4g}" for cell in cells))
    print("teacher step: " + ", ".join(f"{part} {value / sum(step.values()):.1%}" for part, value in step.items()))
    operators = [f"{name} {share:.1%}" for name, share in list(result["operators"].items())[:8]]
    print("by operator, before compiling: " + ", ".join(operators))
    print(f"one step is {result['speed_ratio']:.1f} times as fast as 18 Heun steps")


def diffusers_unet(config, flops, device):
    """diffusers' UNet2DModel with the layout of a SimpleUNet's `config`, at the width whose FLOPs per image are nearest `flops`."""
    side, width, mults = config["img_resolution"], config["model_channels"], config["channel_mult"]
    attends = ["Attn" * (side >> level in config["attn_resolutions"]) for level in range(len(mults))]
    schedule = dict(num_train_timesteps=1000, beta_schedule="linear", beta_start=1e-4, beta_end=0.02)  # DDPM's

    def peer(width):
        unet = dict(
            block_out_channels=[width * mult for mult in mults],
            layers_per_block=config["num_blocks"],
            down_block_types=[f"{kind}DownBlock2D" for kind in attends],
            up_block_types=[f"{kind}UpBlock2D" for kind in reversed(attends)],
            norm_num_groups=width // 4,
        )
        return DiffusersUNet(side, config["img_channels"], config["label_dim"], unet, "epsilon", schedule)

    image, label = torch.zeros(1, config["img_channels"], side, side), torch.zeros(1, dtype=torch.long)
    peers = (peer(width) for width in range(8, width + 8, 8))
    best = min(peers, key=lambda net: abs(count(lambda: net(image, 1.0, label))[0] - flops))
    return best.to(device, memory_format=memory_layout(device))


if __name__ == "__main__":
    exit_on_error(main, args)
