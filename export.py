"""Write a one-step generator as an ONNX file, noise and class to image, checked against PyTorch; or a checkpoint as safetensors."""

from support.config import EXPORT, UserError, exit_on_error, parse_args, writing

args = exit_on_error(parse_args, EXPORT, __doc__) if __name__ == "__main__" else None  # before torch: --help answers at once

from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch

import checkpoint
from sampling import class_noise
from support.images import to_uint8

TOLERANCE = 1e-4  # of images in [-1, 1]; one step of 8 bits is 8e-3


class Deployed(torch.nn.Module):
    """Noise `[B, C, H, W]` and labels `[B]` to images `[B, C, H, W]` in [-1, 1] and pixels, uint8 `[B, H, W, C]`."""

    def __init__(self, net, sampler):
        super().__init__()
        self.net, self.sampler = net, sampler

    def forward(self, noise, labels):
        images = self.sampler(self.net, noise, labels)
        return images, to_uint8(images).permute(0, 2, 3, 1)


def main(args):
    """Writes an ONNX or safetensors file by the options `args`, as `parse_args(EXPORT, ...)` gives them."""
    output = Path(args.output or f"./generator.{args.format}")
    if output.is_dir():
        raise UserError(f"--output {output}: a folder; name a file, such as generator.{args.format}")
    if args.format == "safetensors":
        state = checkpoint.load(args.checkpoint)
        checkpoint.network(state, args.checkpoint)  # refuses what nobody could load
        checkpoint.save_safetensors(output, state)
        print(f"wrote {output}: weights and configuration, without optimizer states")
        return
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if not find_spec(name)]
    if missing:
        raise UserError(f"export needs packages that are not installed: pip install {' '.join(missing)}")
    import onnxruntime  # after the message about what is missing

    state = checkpoint.load(args.checkpoint)
    if checkpoint.kind(state) != "dmd2":
        raise UserError(f"--checkpoint {args.checkpoint}: a teacher; only a generator makes an image in one step")
    model = Deployed(checkpoint.network(state, args.checkpoint), checkpoint.sampler(state)[0]).eval()
    shape = [model.net.config[key] for key in ("img_channels", "img_resolution", "img_resolution")]
    temporary = output.with_name(output.name + ".tmp")
    any_size = {0: torch.export.Dim.DYNAMIC}
    try:
        with writing(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            torch.onnx.export(
                model,
                class_noise([0], 2, shape, seed=0),
                temporary,
                input_names=["noise", "labels"],
                output_names=["images", "pixels"],
                dynamic_shapes={"noise": any_size, "labels": any_size},
                external_data=False,
                dynamo=True,
                verbose=False,
            )
        difference = check(onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"]), model, shape)
        if not difference <= TOLERANCE:
            raise UserError(f"--output {output}: not written: it gave images {difference:.1e} away from PyTorch's")
        with writing(output):
            temporary.replace(output)
    finally:
        with suppress(OSError):
            temporary.unlink()
    print(f"images at most {difference:.1e} away from PyTorch's (on a scale of -1 to 1)")
    print(f"wrote {output}: noise {['batch', *shape]}, labels ['batch'] -> images, pixels")


def check(session, model, shape):
    """The largest difference of the ONNX `session`'s images to those of `model`, over every class and two sizes of batch.

    Where the pixels are not the images' own, it is infinite.
    """
    worst = torch.tensor(0.0)
    for num_samples in (1, 3):
        noise, labels = class_noise(range(model.net.label_dim), num_samples, shape, seed=1)
        outputs = session.run(["images", "pixels"], {"noise": noise.numpy(), "labels": labels.numpy()})
        images, pixels = map(torch.from_numpy, outputs)
        with torch.no_grad():
            expected = model(noise, labels)[0]
        worst = torch.maximum(worst, (images - expected).abs().max())  # which, unlike Python's max, lets NaN through
        if pixels.dtype != torch.uint8 or (pixels.permute(0, 3, 1, 2).int() - to_uint8(images).int()).abs().max() > 1:
            return float("inf")
    return worst.item()


if __name__ == "__main__":
    exit_on_error(main, args)
