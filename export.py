"""Export a generator as an ONNX file for any batch size, checked against PyTorch; as a browser page; or as a safetensors file."""

from support.config import EXPORT, UserError, exit_on_error, parse_args, writing

args = exit_on_error(parse_args, EXPORT, __doc__) if __name__ == "__main__" else None  # before torch: --help answers at once

import json
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch

import checkpoint
from sampling import class_noise, few_step_sampler, random_stream
from support import page
from support.images import to_uint8

TOLERANCE = 1e-4  # for images in [-1, 1], where one 8-bit step is 8e-3


class Deployed(torch.nn.Module):
    """From standard normal noise `[B, C, H, W]` for each noise level, then (with classes) labels `[B]`, to images and pixels.

    images: float32 `[B, C, H, W]` in [-1, 1]; pixels: the same as uint8 `[B, H, W, C]`. A label outside the classes is an error.
    """

    def __init__(self, net, student_sigmas):
        super().__init__()
        self.net, self.student_sigmas = net, student_sigmas
        self.input_names = [
            "noise",
            *[f"noise_{level}" for level in range(1, len(student_sigmas))],
            *["labels"] * bool(net.label_dim),
        ]
        self.register_buffer("classes", torch.arange(net.label_dim))

    def forward(self, *inputs):
        noise, *fresh_noise = inputs[: len(inputs) - bool(self.net.label_dim)]
        labels = None
        if self.net.label_dim:
            # ONNX's one_hot silently turns a wrong label into zeros; as an index, a negative label would count from the end
            labels = self.classes[inputs[-1].where(inputs[-1] >= 0, self.net.label_dim)]
        images = few_step_sampler(self.net, noise, labels, self.student_sigmas, fresh_noise=fresh_noise).clamp(-1, 1)
        return images, to_uint8(images).permute(0, 2, 3, 1)


def main(args):
    """Writes an ONNX or safetensors file, or a page, with the options `args` from `parse_args(EXPORT, ...)`."""
    output = Path(args.output or Path(args.page or ".", f"generator.{args.format}"))
    if output.is_dir():
        raise UserError(f"--output {output}: a folder; give the name of a file, such as generator.{args.format}")
    present = [path for path in [output, *(page.files(args.page) if args.page else [])] if path.exists()]
    if present and not args.overwrite:
        raise UserError(f"{present[0]} exists; choose another path, or replace it with --overwrite")
    if args.format == "safetensors":
        state = checkpoint.load(args.checkpoint)
        checkpoint.network(state, args.checkpoint)  # refuses a checkpoint that could not be loaded again
        checkpoint.save_safetensors(output, state)
        print(f"wrote {output}: weights and configuration, without optimizer states")
        return
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if not find_spec(name)]
    if missing:
        raise UserError(f"export needs packages that are not installed: pip install {' '.join(missing)}")
    state = checkpoint.load(args.checkpoint)
    if checkpoint.kind(state) != "dmd2":
        raise UserError(f"--checkpoint {args.checkpoint}: a teacher; export.py takes a generator, which needs few evaluations")
    runtime = page.find_runtime(args.ort) if args.page else None

    net, student_sigmas = checkpoint.network(state, args.checkpoint), state["student_sigmas"]
    facts = {
        "class_names": (state.get("class_names") or [str(label) for label in range(net.label_dim)])[: net.label_dim],
        "shape": [net.config[key] for key in ("img_channels", "img_resolution", "img_resolution")],
        "student_sigmas": student_sigmas,
        "network_evaluations": len(student_sigmas),
        "step": state["step"],
        "versions": checkpoint.versions(),
    }
    write_onnx(output, Deployed(net, student_sigmas).eval(), facts)
    if args.page:
        page.write(args.page, facts, runtime)


def write_onnx(output, model, facts):
    """Writes `model` to the path `output` if it passes `check`. Its metadata are the `facts`, each as JSON."""
    import onnxruntime  # not before `main` has reported missing packages

    temporary = output.with_name(output.name + ".tmp")
    any_size = {0: torch.export.Dim.DYNAMIC}
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    try:
        program = torch.onnx.export(
            model,
            example(model, facts["shape"], num_samples=2, seed=0),
            input_names=model.input_names,
            output_names=["images", "pixels"],
            dynamic_shapes={"inputs": (any_size,) * len(model.input_names)},
            dynamo=True,
            verbose=False,
        )
        program.model.metadata_props.update({name: json.dumps(value) for name, value in facts.items()})
        with writing(output):
            program.save(temporary, external_data=False)
        difference = check(onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"]), model, facts["shape"])
        if not difference <= TOLERANCE:
            raise UserError(f"{output}: not written: its images differ from PyTorch's by {difference:.1e}")
        with writing(output):
            temporary.replace(output)
    finally:
        with suppress(OSError):
            temporary.unlink()
    print(f"largest difference from PyTorch's images: {difference:.1e} (on a scale of -1 to 1)")
    shapes = [f"{name} {['batch', *facts['shape']] if name != 'labels' else ['batch']}" for name in model.input_names]
    print(f"wrote {output}: {', '.join(shapes)} -> images, pixels")


def example(model, shape, num_samples, seed):
    """Inputs of `model` for `num_samples` images per class, of at most ten classes, evenly spread."""
    K = model.net.label_dim
    noise, labels = class_noise(range(0, K, max(1, -(-K // 10))), num_samples, shape, seed)
    draw = random_stream(seed, K + 1)  # a stream that no class uses
    fresh = [torch.randn(noise.shape, generator=draw) for name in model.input_names if name.startswith("noise_")]
    return noise, *fresh, *[labels] * bool(K)


def check(session, model, shape):
    """The largest difference between the images of the ONNX `session` and of `model`, for up to ten classes and two batch sizes.

    It is infinite if the pixels do not match the images.
    """
    worst = torch.tensor(0.0)
    for num_samples in (1, 3):
        inputs = example(model, shape, num_samples, seed=1)
        feeds = {name: tensor.numpy() for name, tensor in zip(model.input_names, inputs, strict=True)}
        images, pixels = map(torch.from_numpy, session.run(["images", "pixels"], feeds))
        with torch.no_grad():
            expected = model(*inputs)[0]
        worst = torch.maximum(worst, (images - expected).abs().max())  # unlike Python's max, it propagates NaN
        if pixels.dtype != torch.uint8 or (pixels.permute(0, 3, 1, 2).int() - to_uint8(images).int()).abs().max() > 1:
            return float("inf")
    return worst.item()


if __name__ == "__main__":
    exit_on_error(main, args)
