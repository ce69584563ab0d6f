"""Measure how fast this machine trains and samples. The tasks are timed in turn, so that its moods affect all alike."""

import copy
import platform
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

import train_teacher
from evaluation.costs import forward_flops
from evaluation.results import write_results
from guidance import GuidanceModel
from model import SimpleUNet, denoising_loss
from networks.diffusers_unet import DiffusersUNet
from sampling import heun_sampler
from support.device import autocast, choose_device, compile_networks
from support.optimizers import build_optimizer, optimizer_step, update_ema
from support.options import Option, count, flag, parse_args, path
from support.script import run_script, writing
from unified_model import UnifiedModel

DIGITS = Path(__file__).parents[1] / "configs" / "mnist0.yaml"  # read if there is no --config
OPTIONS = train_teacher.OPTIONS | {
    "benchmark": [
        Option("repeats", 7, count, "how many times each task is timed; medians are reported"),
        Option("output", "benchmark.json", path, "file to write the results to"),
        Option("peers", False, flag, "also time diffusers' UNet2DModel, at equal FLOPs (needs pip install diffusers)"),
    ]
}


def main(argv=None):
    """Times the tasks with the options in `argv`, by default those of the command line."""
    args = parse_args(OPTIONS, __doc__, argv, DIGITS)
    device = choose_device(args)
    with writing(args.output), open(args.output, "a"):
        pass  # fails now, not after minutes of timing
    torch.manual_seed(args.seed)
    tasks, networks = make_tasks(args, device)
    flops, memory, seconds = {}, {}, {name: [] for name in tasks}
    for name, task in tasks.items():
        with FlopCounterMode(display=False) as counter:
            task()
        flops[name] = counter.get_total_flops()
    compile_networks(args, *networks)
    for _ in range(args.repeats + 1):
        for name, task in tasks.items():
            seconds[name].append(timed(task, device))
            if device.type == "cuda":
                memory[name] = torch.cuda.max_memory_allocated(device)
                torch.cuda.reset_peak_memory_stats(device)

    rows = {}
    for name, (_, *times) in seconds.items():  # the first round is a warm-up
        speed, rate = args.batch_size / median(times), flops[name] / median(times)
        rows[name] = {"images_per_second": speed, "flops_per_second": rate, "peak_memory": memory.get(name)}
        peak = f", at most {memory[name] / 2**30:.2f} GiB" if memory else ""
        print(f"{name:20}{speed:10.4g} images/s{rate / 1e9:10.4g} GFLOP/s{peak}")
    speed_ratio = rows["one step"]["images_per_second"] / rows["Heun, 18 steps"]["images_per_second"]
    print(f"one step is {speed_ratio:.1f} times as fast as 18 Heun steps")
    result = {name: getattr(args, name) for name in ("batch_size", "precision", "compile", "optimizer")} | {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": str(torch.__version__),
        "network": networks[0].config,
        "rows": rows,
        "speed_ratio": speed_ratio,
    }
    write_results(args.output, result)
    print(f"wrote {args.output}")


def timed(task, device):
    """The seconds that a call of `task` takes."""
    wait = torch.cuda.synchronize if device.type == "cuda" else int
    wait()
    start = time.perf_counter()
    task()
    wait()
    return time.perf_counter() - start


def make_tasks(args, device):
    """(tasks, networks). The tasks, functions by name, do with a batch of random images what the scripts do."""
    shape = (args.img_channels or (1 if "mnist" in args.dataset else 3), args.img_resolution, args.img_resolution)
    classes = 10 if args.label_dim is None else args.label_dim
    net = train_teacher.build_network(args, shape[0], classes).to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    model = UnifiedModel(GuidanceModel(copy.deepcopy(ema))).to(device).eval()
    generator, fake_unet = model.feedforward_model, model.guidance_model.fake_unet
    images, noise = torch.randn(2, args.batch_size, *shape, device=device)
    labels = torch.randint(max(1, classes), (args.batch_size,), device=device)
    sigma = torch.randn(args.batch_size, device=device).exp()

    def training(network, loss_of):
        optimizer = build_optimizer(args.optimizer, network, lr=1e-9)

        def step():
            with autocast(args, device):
                loss = loss_of()
            loss.backward()
            optimizer_step(optimizer, 1e-9, args.clip_grad_norm)

        return step

    def denoising(network):
        noisy = images + sigma[:, None, None, None] * noise
        return denoising_loss(network(noisy, sigma, labels), images, sigma, args.sigma_data, args.prediction)

    @torch.inference_mode()
    def sample(sampler):
        with autocast(args, device):
            sampler(noise, labels)

    step = training(net, lambda: denoising(net))
    tasks = {
        "teacher step": lambda: (step(), update_ema(ema, net, args.ema_decay, 1)),
        "guidance turn": training(fake_unet, lambda: model.guidance_turn(images, labels)[0]["loss_fake_mean"]),
        "generator turn": training(generator, lambda: model.generator_turn(noise, labels)[0]["loss_dm"]),
        "one step": partial(sample, model.generate),
        "Heun, 18 steps": partial(sample, partial(heun_sampler, ema)),
    }
    plain = copy.deepcopy(net).to(memory_format=torch.contiguous_format)  # on CUDA, eager norms copy channels last
    tasks["teacher step, NCHW"] = training(plain, lambda: denoising(plain))
    if args.peers:
        peer = diffusers_unet(net.config).to(device, memory_format=torch.channels_last)
        tasks["diffusers step"] = training(peer, lambda: denoising(peer))
        tasks["diffusers Heun"] = partial(sample, partial(heun_sampler, peer))
    return tasks, [net, plain, ema, generator, model.guidance_model.real_unet, fake_unet]


def diffusers_unet(config):
    """diffusers' UNet2DModel with the layout of a SimpleUNet's `config`, at the width with the nearest FLOPs."""
    side, mults = config["img_resolution"], config["channel_mult"]
    attends = ["Attn" * (side >> level in config["attn_resolutions"]) for level in range(len(mults))]
    unet = {"layers_per_block": config["num_blocks"]}
    unet |= {"down_block_types": [f"{kind}DownBlock2D" for kind in attends]}
    unet |= {"up_block_types": [f"{kind}UpBlock2D" for kind in reversed(attends)]}
    schedule = dict(num_train_timesteps=1000, beta_schedule="linear", beta_start=1e-4, beta_end=0.02)  # DDPM's

    def peer(width):
        widths = {"block_out_channels": [width * mult for mult in mults], "norm_num_groups": width // 4}
        return DiffusersUNet(side, config["img_channels"], config["label_dim"], unet | widths, "epsilon", schedule)

    flops = forward_flops(SimpleUNet(**config).to("meta"))
    peers = (peer(width) for width in range(8, config["model_channels"] + 8, 8))
    return min(peers, key=lambda net: abs(forward_flops(copy.deepcopy(net).to("meta")) - flops))


if __name__ == "__main__":
    run_script(main)
