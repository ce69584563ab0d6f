"""How fast this machine trains and samples, and how near it comes to its own ceiling: all timed in turn, medians told."""

from pathlib import Path

from config import BENCHMARK, UserError, parse_args, run, writing


def main():
    args = parse_args(BENCHMARK, __doc__, config=Path(__file__).parent / "config_mnist0.yaml")

    import copy  # heavy modules come after the options, so that --help and mistakes answer at once
    import json
    import platform
    import tempfile
    from collections import defaultdict
    from functools import partial
    from inspect import signature
    from statistics import median
    from time import perf_counter

    import torch
    import torch.nn.functional as F

    from data import Batches, Dataset
    from guidance import GuidanceModel
    from logger import Logger
    from model import SimpleUNet, denoising_loss
    from sampling import heun_sampler, one_step_sampler
    from training import adamw, autocast, choose_device, compile_networks, optimizer_step, update_ema
    from unified_model import UnifiedModel

    # ---- setup: what the two training scripts build, on images of noise --------------------------------------------------
    device = choose_device(args)
    with writing(args.output), open(args.output, "a"):
        pass  # better now than after minutes of timing
    torch.manual_seed(args.seed)
    names = signature(SimpleUNet).parameters.keys() - {"img_channels", "label_dim"}
    image_shape = (args.img_channels or (1 if "mnist" in args.dataset else 3), args.img_resolution, args.img_resolution)
    net = SimpleUNet(img_channels=image_shape[0], **{name: getattr(args, name) for name in names})
    net = net.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    model = UnifiedModel(GuidanceModel(copy.deepcopy(ema))).to(device).eval()
    generator, fake_unet = model.feedforward_model, model.guidance_model.fake_unet
    optimizer, optimizer_generator, optimizer_guidance = (adamw(n.parameters(), 1e-9) for n in (net, generator, fake_unet))

    pixels = torch.randint(256, (max(1000, args.batch_size), *image_shape), dtype=torch.uint8, device=device)
    dataset = Dataset(pixels, torch.randint(net.label_dim, (len(pixels),), device=device), [str(i) for i in range(net.label_dim)])
    batches = Batches(dataset, args.batch_size, args.seed, args.hflip)
    images, labels = next(batches)
    noise = torch.randn_like(images)
    args.step_number, args.wandb = 10**9, False
    folder = tempfile.TemporaryDirectory()
    args.output_dir = folder.name
    logger = Logger(args, "teacher")
    logger.bar.leave = False
    logger.bar.close()

    # ---- what is timed: each calls `mark(part)` after each part of it ----------------------------------------------------
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

    def dmd2_turn(mark, turn, loss_name, optimizer):
        with autocast(args, device):
            loss_dict = turn(noise, labels)[0]
        loss_dict[loss_name].backward()
        mark("network")
        optimizer_step(optimizer, 1e-9, args.clip_grad_norm)
        mark("clipping and optimizer")

    @torch.inference_mode()
    def sampling(mark, net, sampler):
        with autocast(args, device):
            sampler(net, noise, labels)
        mark("network")

    def convolution(mark, x, weight):
        with autocast(args, device):
            y = F.conv2d(x, weight, padding=1)
        mark("forward")
        y.backward(y.detach())
        mark("backward")

    tasks = {
        "teacher step": teacher_step,
        "guidance turn": partial(dmd2_turn, turn=model.guidance_turn, loss_name="loss_fake_mean", optimizer=optimizer_guidance),
        "generator turn": partial(dmd2_turn, turn=model.generator_turn, loss_name="loss_dm", optimizer=optimizer_generator),
        "one step": partial(sampling, net=generator, sampler=one_step_sampler),
        "Heun, 18 steps": partial(sampling, net=ema, sampler=heun_sampler),
    }
    if args.peers:
        peer = diffusers_unet(net.config, count(lambda: net(images, 1.0, labels))[0] / len(images), device)
        optimizer_peer = torch.optim.AdamW(peer.parameters(), lr=1e-9)

        def peer_step(mark):
            with autocast(args, device):
                loss = F.mse_loss(peer(images, 1.0, labels), images)
            loss.backward()
            mark("network")
            optimizer_peer.step()
            optimizer_peer.zero_grad()
            mark("clipping and optimizer")

        tasks |= {"diffusers step": peer_step, "diffusers Heun": partial(sampling, net=peer, sampler=heun_sampler)}

    # The 3x3 convolutions of the network, each by itself, set the ceiling.
    shapes = set()
    convolutions = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    hooks = [
        m.register_forward_pre_hook(lambda m, inputs: shapes.add((m.out_channels, *inputs[0].shape[1:]))) for m in convolutions
    ]
    net(images, 1.0, labels)
    for hook in hooks:
        hook.remove()
    channels_last = dict(device=device, memory_format=torch.channels_last)
    for out_channels, in_channels, height, width in sorted(shapes):
        x = torch.randn(args.batch_size, in_channels, height, width).to(**channels_last).requires_grad_()
        weight = torch.randn(out_channels, in_channels, 3, 3).to(**channels_last).requires_grad_()
        tasks[f"convolution {in_channels} to {out_channels} at {height}"] = partial(convolution, x=x, weight=weight)

    # Counted: weights of four networks (teacher, fake_unet, generator, average) and Adam's two moments of two. Gradients come as
    # the activations of the one network in training go; a block of the others, which run without gradients, comes on top.
    weights = 4 * sum(parameter.numel() for parameter in net.parameters())
    with autocast(args, device):
        activations = saved_for_backward(net, images, 1.0, labels)
    widest = 4 * args.batch_size * max(in_channels * height * width for _, in_channels, height, width in shapes)
    counted = 8 * weights + max(weights, activations + 4 * widest)

    # ---- timing: in turn, so that a machine's moods meet all alike -------------------------------------------------------
    counts = {name: count(partial(task, lambda part: None)) for name, task in tasks.items()}
    flops, memory = ({name: count[i] for name, count in counts.items()} for i in range(2))
    by_operator = shares_by_operator(partial(teacher_step, lambda part: None), 5, device)
    compile_networks(args, net, ema, generator, model.guidance_model.real_unet, fake_unet)
    seconds = {name: defaultdict(list) for name in tasks}  # by task and part
    for repeat in range(args.repeats + 1):
        for name, task in tasks.items():
            parts, last = defaultdict(float), None

            def mark(part):
                nonlocal last
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                now = perf_counter()
                if last is not None:
                    parts[part] += now - last  # noqa: B023 - called within this turn of the loop
                last = now

            mark("start")
            task(mark)
            for part, value in parts.items():
                if repeat:  # the first turn warms up
                    seconds[name][part].append(value)

    # ---- what is told ----------------------------------------------------------------------------------------------------
    time = {name: {part: median(values) for part, values in parts.items()} for name, parts in seconds.items()}
    convolutions = [name for name in tasks if name.startswith("convolution")]
    ceilings = {
        "forward": max(flops[name] / 3 / time[name]["forward"] for name in convolutions),
        "training": max(flops[name] / sum(time[name].values()) for name in convolutions),
    }
    rows = {}
    for name in tasks:
        total = sum(time[name].values())
        rate = flops[name] / time[name].get("network", total)
        trains = "clipping and optimizer" in time[name] or name in convolutions
        rows[name] = {
            "images_per_second": args.batch_size / total,
            "flops_per_second": rate,
            "share_of_ceiling": rate / ceilings["training" if trains else "forward"],
            "peak_memory": memory[name],
            "seconds": time[name],
        }
    step = time["teacher step"]
    measured = 8 * weights + max(memory["guidance turn"], memory["generator turn"])
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "network": net.config,
        "batch_size": args.batch_size,
        "precision": args.precision,
        "compile": args.compile,
        "ceilings": ceilings,
        "rows": rows,
        "dmd2_memory": {"counted": counted, "measured": measured},
        "operators": by_operator,
        "not_network": 1 - step["network"] / sum(step.values()),
        "speed_ratio": rows["one step"]["images_per_second"] / rows["Heun, 18 steps"]["images_per_second"],
    }
    print(f"{result['device']}, {result['machine']}, torch {torch.__version__}, batch {args.batch_size}, {args.precision}")
    print(f"ceiling: {ceilings['forward'] / 1e9:.1f} GFLOP/s forward, {ceilings['training'] / 1e9:.1f} forward and backward")
    print(f"{'':34}{'images/s':>12}{'GFLOP/s':>12}{'of ceiling':>12}{'peak MB':>12}")
    for name, row in rows.items():
        cells = [row["images_per_second"], row["flops_per_second"] / 1e9, row["share_of_ceiling"], row["peak_memory"] / 1e6]
        print(f"{name:34}" + "".join(f"{cell:12.4g}" for cell in cells))
    shares = ", ".join(f"{part} {seconds / sum(step.values()):.1%}" for part, seconds in step.items())
    print(f"teacher step: {shares}")
    print("by operator, before compiling: " + ", ".join(f"{name} {share:.1%}" for name, share in list(by_operator.items())[:8]))
    print(f"peak memory of DMD2: {measured / 1e6:.0f} MB, of tensors; counted on paper {counted / 1e6:.0f} MB")
    print(f"one step is {result['speed_ratio']:.1f} times as fast as Heun's 18")
    with writing(args.output):
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {args.output}")


def count(task):
    """What one call of `task` takes: floating-point operations of its products of matrices and convolutions, and the most bytes of
    tensors that it holds beyond those that were there before."""
    import weakref

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import FlopCounterMode

    def storages(tree):
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
        return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}

    class Memory(TorchDispatchMode):
        live, peak = {}, 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            given = storages((args, kwargs))
            for pointer, storage in storages(result).items():
                if pointer not in given and pointer not in self.live:
                    self.live[pointer] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, pointer)
            self.peak = max(self.peak, sum(self.live.values()))
            return result

    with FlopCounterMode(display=False) as flops, Memory() as memory:
        task()
    return flops.get_total_flops(), memory.peak


def shares_by_operator(task, repeats, device):
    """The shares of the time of `repeats` calls of `task` that torch's operators take, backward passes included, largest first."""
    from collections import defaultdict
    from time import perf_counter

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    seconds = defaultdict(float)

    class Timer(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            start = perf_counter()
            result = function(*args, **(kwargs or {}))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            name = function.overloadpacket.__name__.removeprefix("native_").removesuffix("_backward").rstrip("_")
            seconds[name] += perf_counter() - start
            return result

    with Timer():
        for _ in range(repeats):
            task()
    total = sum(seconds.values())
    return {name: spent / total for name, spent in sorted(seconds.items(), key=lambda item: -item[1])}


def saved_for_backward(net, *inputs):
    """The bytes that a forward pass of `net` keeps for the backward pass, parameters aside."""
    import torch

    parameters = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    saved = {}  # by storage, which two saved tensors may share

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(*inputs)
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in saved.items() if storage not in parameters)


def diffusers_unet(config, flops, device):
    """diffusers' UNet2DModel after a SimpleUNet's `config`, as wide as `flops` an image allow, called as SimpleUNet is."""
    import torch

    try:
        from diffusers import UNet2DModel
    except ImportError:
        raise UserError("--peers needs the package diffusers: pip install diffusers") from None

    class Peer(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            side, levels = config["img_resolution"], len(config["channel_mult"])
            attends = ["Attn" * (side >> level in config["attn_resolutions"]) for level in range(levels)]
            self.unet = UNet2DModel(
                sample_size=side,
                in_channels=config["img_channels"],
                out_channels=config["img_channels"],
                block_out_channels=[width * mult for mult in config["channel_mult"]],
                layers_per_block=config["num_blocks"],
                down_block_types=[f"{kind}DownBlock2D" for kind in attends],
                up_block_types=[f"{kind}UpBlock2D" for kind in reversed(attends)],
                norm_num_groups=width // 4,
                num_class_embeds=config["label_dim"],
            )

        def forward(self, x, sigma, labels):
            sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x))
            return self.unet(x, sigma, class_labels=labels).sample

    image = torch.zeros(1, config["img_channels"], config["img_resolution"], config["img_resolution"])
    best = min(
        (Peer(width) for width in range(8, config["model_channels"] + 8, 8)),
        key=lambda peer: abs(count(lambda: peer(image, 1.0, torch.zeros(1, dtype=torch.long)))[0] - flops),
    )
    return best.to(device, memory_format=torch.channels_last)


if __name__ == "__main__":
    run(main)
