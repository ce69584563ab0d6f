"""Points in the plane, for toy.py: how they fill the modes of a mixture, their divergence from it, and the animation.

A `target` is toy.py's `ExactTeacher`. Points are float32 `[N, 2]`.
"""

import math

import torch
from PIL import Image

from evaluation.plots import new_figure
from support.script import writing


def measure_modes(points, target):
    """How the points fill the modes, as a dict.

    modes found: modes with at least a fifth of their share of the points within three standard deviations
    share inside: of the points, within three standard deviations of a mode; 0.989 is right
    total variation: half the sum of |share - weight| over the modes; a point belongs to the nearest mode
    spread in a mode: of the points inside it, about its mean, relative to the target's; 1 is right
    """
    distance, mode = torch.cdist(points, target.means).min(1)
    inside = distance < 3 * target.std
    share, share_inside = (torch.bincount(m, minlength=len(target.means)) / len(points) for m in (mode, mode[inside]))
    cut = math.exp(-4.5)  # the part of a Gaussian in the plane beyond three standard deviations
    true_square = 2 * target.std**2 * (1 - 4.5 * cut / (1 - cut))
    return {
        "modes found": (share_inside >= 0.2 * target.weights).sum().item(),
        "share inside": inside.float().mean().item(),
        "total variation": (share - target.weights).abs().sum().item() / 2,
        "spread in a mode": (distance[inside].square().mean() / true_square).sqrt().item(),
    }


def kl_divergence(points, target, neighbour=5):
    """An estimate of KL(points | target) in nats, too low where the points lie on thin lines.

    The points' density at one of them is taken to be constant in the disc that reaches to its k-th nearest of N others,
    whose probability has the mean log psi(k) - psi(N + 1) (Kozachenko and Leonenko 1987). The target's is exact.
    """
    exact = dict(compute_mode="donot_use_mm_for_euclid_dist")  # the products of matrices lose small distances
    parts = [torch.cdist(part, points, **exact).topk(neighbour + 1, largest=False) for part in points.split(500)]
    radius = torch.cat([part.values[:, -1] for part in parts])  # of all, a point itself is the nearest
    log_share = torch.tensor(float(neighbour)).digamma() - torch.tensor(float(len(points))).digamma()
    log_density = log_share - math.log(math.pi) - 2 * radius.clamp(min=1e-9).log()
    return (log_density - target.log_density(points)).mean().item()


BLUE, RED, ORANGE, INK = "#3c69a5", "#e14b4b", "#e1962d", "#2d2d2d"
SIDE = 1.4  # of the shown square, in each direction


def animate(frames, target, folder):
    """Writes `folder`/toy.gif, and its last frame as toy.png.

    frames: dicts of `step`, `points` `[N, 2]`, `push` `[M, 2]` (of the first M points), and what `measure_modes` gives
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here, as in `new_figure`

    figure, (left, middle, right) = new_figure(1, 3, 3, 3.2)
    canvas = FigureCanvasAgg(figure)
    axis = torch.linspace(-SIDE, SIDE, 200)
    density = target.log_density(torch.cartesian_prod(axis, axis)).exp().reshape(200, 200).T
    levels = [density.max() * math.exp(-(deviations**2) / 2) for deviations in (3, 2, 1, 0)]
    for panel, title in ((left, "target and generated points"), (middle, "where the points are pushed")):
        panel.contourf(axis, axis, density, levels, colors=["#d2e1f0", "#a5c3e1", "#78a5d2"])
        panel.set(xticks=[], yticks=[], xlim=(-SIDE, SIDE), ylim=(-SIDE, SIDE), aspect="equal")
        panel.set_title(title, fontsize=10, color=INK)
        panel.spines[:].set_visible(False)
    last = frames[-1]["step"]
    right.set_xscale("function", functions=(lambda x: abs(x) ** 0.5, lambda x: x**2))  # as the frames are spaced
    right.set(
        xlim=(0, last), ylim=(0, 1.02), xticks=[0, last // 25, last // 4, last], yticks=[0, 0.5, 1], xlabel="step"
    )
    right.spines[["top", "right"]].set_visible(False)
    curves = {"modes found": BLUE, "share inside": RED, "total variation": ORANGE}

    images = []
    for index, frame in enumerate(frames):
        points, push, so_far = frame["points"], frame["push"], frames[: index + 1]
        some = points[: len(push)]
        moving = [panel.scatter(*part.T, 3, RED, linewidths=0) for panel, part in ((left, points), (middle, some))]
        moving.append(middle.quiver(*some.T, *push.T, color=INK, scale=1, scale_units="xy", width=0.005, minlength=0.5))
        for height, (name, color) in zip((0.5, 0.4, 0.3), curves.items(), strict=True):
            most, form = (len(target.means), f"{{}} of {len(target.means)}") if name == "modes found" else (1, "{:.2f}")
            steps, values = zip(*[(each["step"], each[name] / most) for each in so_far], strict=True)
            moving += right.plot(steps, values, color=color, linewidth=2, clip_on=False)
            told = f"{name}  {form.format(frame[name])}"
            moving.append(right.text(0.97, height, told, ha="right", transform=right.transAxes, color=color))
            moving[-1].set_bbox(dict(facecolor="white", edgecolor="none", alpha=0.8, pad=2))
        right.set_title(f"step {frame['step']}", fontsize=10, color=INK)
        canvas.draw()
        figure.set_layout_engine("none")  # the panels stay where the first frame has them
        images.append(Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB"))
        for artist in moving:
            artist.remove()
    palette = images[-1].quantize(64, Image.Quantize.MAXCOVERAGE)  # few colours, white among them
    first, *rest = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    milliseconds = [600, *[90] * (len(rest) - 1), 3000]
    with writing(folder):
        images[-1].save(folder / "toy.png", optimize=True)
        first.save(folder / "toy.gif", save_all=True, append_images=rest, duration=milliseconds, loop=0, optimize=True)
