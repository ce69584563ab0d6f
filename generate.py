"""Generate images of each class from a generator (one network evaluation an image) or a teacher (Heun's method)."""

from config import GENERATE, UserError, did_you_mean, make_folder, parse_args, run, writing


def main():
    args = parse_args(GENERATE, __doc__)

    import re  # heavy modules come after the options, so that --help and mistakes answer at once
    import time
    from pathlib import Path

    import numpy as np
    import torch
    from PIL import Image

    import checkpoint
    from data import to_uint8
    from logger import save_grid
    from parallel import rank
    from sampling import class_noise, sample_in_batches
    from training import autocast, choose_device, compile_networks

    device = choose_device(args)
    state = checkpoint.load(args.checkpoint)
    net = checkpoint.network(state, args.checkpoint, device)
    compile_networks(args, net)
    names = state.get("class_names") or [str(label) for label in range(net.label_dim)]
    classes = list(range(len(names)))
    if args.classes:
        wanted = dict.fromkeys(name.strip() for name in args.classes.split(","))
        for name in wanted:
            if name not in names:
                raise UserError(f"--classes: no class {name!r}{did_you_mean(name, names)}; there are {', '.join(names)}")
        classes = [names.index(name) for name in wanted]

    output_dir = Path(args.output_dir)
    make_folder("--output_dir", output_dir)
    shape = (net.config["img_channels"], net.config["img_resolution"], net.config["img_resolution"])
    noise, labels = class_noise(classes, args.num_samples, shape, args.seed)

    start = time.perf_counter()
    sampler, evaluations = checkpoint.sampler(state, args.steps)
    with autocast(args, device):
        images = sample_in_batches(sampler, net, noise, labels, args.batch_size)
    if rank():
        return
    seconds = time.perf_counter() - start
    print(f"{len(images)} images in {seconds:.2f} s, {evaluations} network evaluation{'s' * (evaluations > 1)} an image")

    if args.format == "npz":
        pixels = to_uint8(images).permute(0, 2, 3, 1).numpy()
        with writing(output_dir / "samples.npz"):
            np.savez(output_dir / "samples.npz", images=pixels, labels=labels.numpy())
        print(f"wrote {output_dir / 'samples.npz'}")
        return
    by_class = images.split(args.num_samples)
    file_names = [re.sub(r"[^\w-]", "_", name.lower()) for name in names]  # "T-shirt/top" is no file name
    for label, class_images in zip(classes, by_class, strict=True):
        name = file_names[label] if file_names.count(file_names[label]) == 1 else f"{file_names[label]}_{label}"
        if args.format == "grid":
            save_grid(output_dir / f"{name}_samples.png", class_images, columns=max(1, round(args.num_samples**0.5)))
            continue
        make_folder("--output_dir", output_dir / name)  # a folder a class, as --dataset folder reads it
        for index, pixels in enumerate(to_uint8(class_images).permute(0, 2, 3, 1).numpy()):
            file = output_dir / name / f"{index:06d}.png"
            with writing(file):
                Image.fromarray(pixels.squeeze()).save(file)
    if args.format == "grid":
        overview = torch.cat([class_images[:16] for class_images in by_class])
        save_grid(output_dir / "overview.png", overview, columns=min(args.num_samples, 16))
    print(f"wrote {args.format} PNGs of {len(classes)} classes to {output_dir}")


if __name__ == "__main__":
    run(main)
