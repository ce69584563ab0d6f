"""See DMD2 move: points in the plane, an exact teacher, one command, under a minute on a CPU core.

The target is a mixture of Gaussians, so the answer of a perfect denoiser is known in closed form. It is the teacher.
Generator and `fake_unet` are small networks that first learn to denoise the target. Losses, turns and samplers are
those of images; only the loop is its own. Writes toy.gif and toy.png, and prints how far the points of generator and
teacher are from the target.
"""

import copy
import math
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import train_dmd2
from evaluation.points import animate, kl_divergence, measure_modes
from guidance import GuidanceModel
from model import Denoiser, denoising_loss
from sampling import heun_sampler, one_step_sampler
from support.optimizers import adamw, lr_factor, optimizer_step, update_ema
from support.options import Option, choice, parse_args, path, share
from support.script import as_user_error, make_folder, run_script
from unified_model import UnifiedModel

SHARED = {option.name: option for table in train_dmd2.OPTIONS.values() for option in table}
DEFAULTS = dict(step_number=5000, batch_size=512, dfake_gen_update_ratio=5, generator_lr=4e-3, guidance_lr=8e-3)
DEFAULTS |= dict(conditioning_sigma=2.5, objective="dmd", f_divergence="rkl", gan_classifier=False, seed=0)
OPTIONS = {
    "points": [
        Option("target", "ring", choice("ring", "unequal", "grid"), "8 modes; 8 of weights 1 to 8; 5 x 5 modes"),
        Option("start", "target", choice("target", "collapsed"), "collapsed: the networks first learn one mode alone"),
        Option("prediction", "edm", choice("edm", "flow"), "what generator and fake_unet predict"),
        Option("ema_decay", 0.99, share, "decay of the average of the generator"),
        Option("output_dir", "./log/toy", path, "where the pictures go"),
    ],
    "of train_dmd2.py": [SHARED[name]._replace(default=default) for name, default in DEFAULTS.items()],
}
GEN_CLS_LOSS_WEIGHT = 0.1
CLIP_GRAD_NORM = 10.0
NUM_POINTS, NUM_FRAMES = 5000, 60


# ---- the target, its exact teacher, and a network for points --------------------------------------------------------


def mixture(name):
    """A target: the means of its modes `[K, 2]`, their weights `[K]`, their standard deviation in each direction."""
    if name == "grid":
        side = torch.linspace(-1, 1, 5)
        return torch.cartesian_prod(side, side), torch.full((25,), 1 / 25), 0.05
    angle = torch.arange(8) * math.pi / 4
    weights = torch.arange(1.0, 9.0) if name == "unequal" else torch.ones(8)
    return torch.stack([angle.cos(), angle.sin()], dim=1), weights / weights.sum(), 0.1


class ExactTeacher(nn.Module):
    """The posterior mean E[x0 | x0 + sigma n] of a mixture of Gaussians: the best denoiser there is.

    means: `[K, 2]`; weights: `[K]`, of sum 1; std: of each mode in each direction. Points are images `[B, 2, 1, 1]`.
    """

    def __init__(self, means, weights, std):
        super().__init__()
        self.means, self.weights, self.std = means, weights, std

    def log_joint(self, x, sigma):
        """log p(mode, x) `[B, K]` of points `x` with noise `sigma`, `[B]` or a scalar."""
        variance = self.std**2 + torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1) ** 2
        squares = (x.flatten(1)[:, None] - self.means).square().sum(2)
        return self.weights.log() - squares / (2 * variance) - (2 * math.pi * variance).log()

    def log_density(self, x):
        """log p(x) `[B]` of the target."""
        return self.log_joint(x, 0.0).logsumexp(1)

    def forward(self, x, sigma, class_labels=None):
        mean = self.log_joint(x, sigma).softmax(1) @ self.means  # of the mode that x comes from, in the posterior
        variance = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1) ** 2
        return ((self.std**2 * x.flatten(1) + variance * mean) / (self.std**2 + variance)).reshape(x.shape)

    def sample(self, number):
        means = self.means[torch.multinomial(self.weights, number, replacement=True)]
        return (means + self.std * torch.randn(number, 2)).reshape(number, 2, 1, 1)


class PointDenoiser(Denoiser):
    """A perceptron of four hidden layers. Its feature map, of resolution 1, serves the GAN's heads."""

    def __init__(self, sigma_data, prediction="edm", width=128):
        super().__init__(locals() | {"label_dim": 0})
        self.feature_channels = {1: width}
        self.register_buffer("freqs", torch.logspace(-1, 3, 8, base=2))
        self.encoder = nn.Sequential(nn.Linear(2 + 16, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        hidden = [layer for _ in range(2) for layer in (nn.Linear(width, width), nn.SiLU())]
        self.decoder = nn.Sequential(*hidden, nn.Linear(width, 2))

    def run_encoder(self, x, c_noise, class_labels):
        angle = c_noise * self.freqs
        h = self.encoder(torch.cat([x.flatten(1), angle.cos(), angle.sin()], dim=1))
        return {1: h[:, :, None, None]}, (h,)

    def run_decoder(self, h):
        return self.decoder(h)[:, :, None, None]


# ---- training -------------------------------------------------------------------------------------------------------


def learn_to_denoise(net, target, batch_size, steps=400, lr=2e-3):
    """Trains `net` in place, as a teacher of images is trained (EDM)."""
    optimizer = adamw(net.parameters(), lr)
    for step in range(steps):
        x, sigma = target.sample(batch_size), (1.5 * torch.randn(batch_size) - 0.5).exp()
        noisy = x + sigma.reshape(-1, 1, 1, 1) * torch.randn_like(x)
        denoising_loss(net(noisy, sigma), x, sigma, net.sigma_data, net.prediction).backward()
        optimizer_step(optimizer, lr * lr_factor(step, 0, 1.0, steps), CLIP_GRAD_NORM)


@torch.no_grad()
def look(step, points, guidance, sigma=0.3, draws=32):
    """A frame for `animate`. Its push is D_real - D_fake at the noise level `sigma`, a mean over draws of the noise."""
    some = points[:160]
    noisy, sigma = guidance.add_noise(some.repeat(draws, 1, 1, 1), torch.full((draws * len(some),), sigma))
    push = (guidance.real_unet(noisy, sigma) - guidance.fake_unet(noisy, sigma)).reshape(draws, -1, 2).mean(0)
    frame = {"step": step, "points": points[:1000].flatten(1), "push": push}
    return frame | measure_modes(points.flatten(1), guidance.real_unet)


def main(argv=None):
    """Trains with the options in `argv`, by default those of the command line."""
    # ---- setup ------------------------------------------------------------------------------------------------------
    args = parse_args(OPTIONS, __doc__, argv)
    make_folder("--output_dir", args.output_dir)
    torch.set_num_threads(1)  # layers this small gain little from more, and lose much where cores are shared
    torch.manual_seed(args.seed)
    teacher = ExactTeacher(*mixture(args.target))
    generator = PointDenoiser(teacher.sample(100_000).std().item(), args.prediction)
    chosen = {name: getattr(args, name) for name in ("prediction", "objective", "f_divergence", "gan_classifier")}
    with as_user_error("the options"):
        guidance = GuidanceModel(teacher, fake_unet=copy.deepcopy(generator), sigma_data=generator.sigma_data, **chosen)
    model = UnifiedModel(guidance, args.conditioning_sigma, generator=generator)
    one_mode = ExactTeacher(teacher.means[:1], torch.ones(1), teacher.std)
    learn_to_denoise(generator, one_mode if args.start == "collapsed" else teacher, args.batch_size)
    guidance.fake_unet.load_state_dict(generator.state_dict())
    ema = copy.deepcopy(generator).requires_grad_(False)
    optimizer_generator = adamw(generator.parameters(), args.generator_lr)
    optimizer_guidance = adamw([p for p in guidance.parameters() if p.requires_grad], args.guidance_lr)  # with heads
    labels = None  # there are no classes
    shown_noise = torch.randn(NUM_POINTS, 2, 1, 1)
    show = partial(one_step_sampler, ema, shown_noise, None, args.conditioning_sigma)
    # Most frames come early, when most moves.
    shown_steps = {round(args.step_number * (index / (NUM_FRAMES - 1)) ** 2) for index in range(NUM_FRAMES)}
    frames = [look(0, show(), guidance)]

    # ---- loop -------------------------------------------------------------------------------------------------------
    for step in tqdm(range(args.step_number), "training", unit="step", delay=5, mininterval=5):
        noise = torch.randn(args.batch_size, 2, 1, 1)
        lr_scale = lr_factor(step, 0, 1.0, args.step_number)
        if step % args.dfake_gen_update_ratio == 0:
            loss_dict, _, points = model.generator_turn(noise, labels)
            (loss_dict["loss_dm"] + GEN_CLS_LOSS_WEIGHT * loss_dict.get("gen_cls_loss", 0.0)).backward()
            optimizer_step(optimizer_generator, args.generator_lr * lr_scale, CLIP_GRAD_NORM)
            update_ema(ema, generator, args.ema_decay, step // args.dfake_gen_update_ratio + 1, ramp=2)
        else:
            with torch.no_grad():
                points = model.generate(noise, labels)
        loss_dict, _ = model.guidance_turn(points, labels, teacher.sample(args.batch_size), labels)
        (loss_dict["loss_fake_mean"] + loss_dict.get("guidance_cls_loss", 0.0)).backward()
        optimizer_step(optimizer_guidance, args.guidance_lr * lr_scale, CLIP_GRAD_NORM)
        if step + 1 in shown_steps:
            frames.append(look(step + 1, show(), guidance))

    # ---- results ----------------------------------------------------------------------------------------------------
    animate(frames, teacher, Path(args.output_dir))
    columns = {
        "generator": show(),
        "teacher (Heun)": heun_sampler(teacher, shown_noise, None),
        "target itself": teacher.sample(NUM_POINTS),
    }
    flat = [points.flatten(1) for points in columns.values()]
    rows = [measure_modes(points, teacher) | {"KL(points | target)": kl_divergence(points, teacher)} for points in flat]
    print(" " * 20 + "".join(f"{name:>16}" for name in columns))
    for what in rows[0]:
        print(f"{what:20}" + "".join(f"{row[what]:16.3g}" for row in rows))
    print(f"wrote {Path(args.output_dir, 'toy.gif')} and toy.png")


if __name__ == "__main__":
    run_script(main)
