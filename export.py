"""Export a generator as an ONNX file for any batch size, checked against PyTorch."""

import json
from importlib.util import find_spec
from pathlib import Path

import torch

import checkpoint
from sampling import few_step_sampler
from support.options import Option, flag, parse_args, path
from support.script import UserError, make_folder, run_script

OPTIONS = {
    "export": [
        Option("checkpoint", "./log/checkpoints/dmd2/dmd2_final.pt", path, "generator"),
        Option("output", "./generator.onnx", path, "file to write"),
        Option("overwrite", False, flag, "replace an existing file"),
    ]
}
TOLERANCE = 1e-4  # for images in [-1, 1], where one 8-bit step is 8e-3


class Deployed(torch.nn.Module):
    """From normal noise `[B, C, H, W]` for each noise level and (with classes) labels `[B]` to images in [-1, 1].

    A wrong label is an error.
    """

    def __init__(self, net, student_sigmas):
        super().__init__()
        self.net, self.student_sigmas = net, student_sigmas
        self.register_buffer("classes", torch.arange(net.label_dim))

    def forward(self, *inputs):
        labels = None
        if self.net.label_dim:
            *inputs, labels = inputs
            # ONNX's one_hot turns a wrong label into zeros; as an index, a negative one would count from the end
            labels = self.classes[labels.where(labels >= 0, self.net.label_dim)]
        noise, *fresh_noise = inputs
        return few_step_sampler(self.net, noise, labels, self.student_sigmas, fresh_noise=fresh_noise).clamp(-1, 1)


def main(argv=None):
    """Writes the file of the options in `argv`, by default those of the command line."""
    args = parse_args(OPTIONS, __doc__, argv)
    output = Path(args.output)
    if output.is_dir() or (output.exists() and not args.overwrite):
        raise UserError(f"{output} exists; choose another path, or replace a file with --overwrite")
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if not find_spec(name)]
    if missing:
        raise UserError(f"export needs packages that are not installed: pip install {' '.join(missing)}")
    state = checkpoint.load(args.checkpoint)
    net = checkpoint.network(state, args.checkpoint)
    if checkpoint.kind(state) != "dmd2":
        raise UserError(f"--checkpoint {args.checkpoint}: a teacher; export.py takes a generator of few evaluations")
    make_folder("--output", output.parent)  # fails now, not after minutes of exporting
    facts = {
        "class_names": checkpoint.class_names(state, net.label_dim),
        "shape": [net.config[key] for key in ("img_channels", "img_resolution", "img_resolution")],
        "student_sigmas": state["student_sigmas"],
        "step": state["step"],
        "versions": checkpoint.versions(),
    }
    write_onnx(output, Deployed(net, state["student_sigmas"]).eval(), facts)


def write_onnx(output, model, facts):
    """Writes `model` to the path `output` if its images are PyTorch's. Its metadata are the `facts`, each as JSON."""
    import onnxruntime  # not before `main` has reported missing packages

    inputs = example(model, facts["shape"], num_samples=2, seed=0)
    program = torch.onnx.export(
        model,
        tuple(inputs.values()),
        input_names=list(inputs),
        output_names=["images"],
        dynamic_shapes={"inputs": ({0: torch.export.Dim.DYNAMIC},) * len(inputs)},
        dynamo=True,
        verbose=False,
    )
    program.model.metadata_props.update({name: json.dumps(value) for name, value in facts.items()})
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    error = largest_error(session, model, facts["shape"])
    if not error <= TOLERANCE:
        raise UserError(f"{output}: not written: its images differ from PyTorch's by {error:.1e}")
    checkpoint.write(output, lambda file: file.write(content))
    print(f"wrote {output}: inputs {', '.join(inputs)}; largest difference from PyTorch: {error:.1e}")


def example(model, shape, num_samples, seed):
    """Inputs of `model` by name, for `num_samples` images per class, of at most ten classes, evenly spread."""
    K = model.net.label_dim
    labels = torch.arange(0, max(1, K), max(1, -(-K // 10))).repeat_interleave(num_samples)
    generator = torch.Generator().manual_seed(seed)
    names = ["noise", *(f"noise_{level}" for level in range(1, len(model.student_sigmas)))]
    inputs = {name: torch.randn(len(labels), *shape, generator=generator) for name in names}
    return inputs | ({"labels": labels} if K else {})


@torch.no_grad()
def largest_error(session, model, shape):
    """The largest difference of the ONNX `session`'s images from `model`'s."""
    error = torch.zeros(())
    for num_samples in (1, 3):
        inputs = example(model, shape, num_samples, seed=1)
        feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
        off = torch.from_numpy(session.run(["images"], feeds)[0]) - model(*inputs.values())
        error = torch.maximum(error, off.abs().max())  # unlike Python's max, it keeps NaN
    return error.item()


if __name__ == "__main__":
    run_script(main)
