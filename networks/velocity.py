"""VelocityDenoiser: any network that predicts a velocity, such as one trained by flow matching, as D(x; sigma)."""

import torch
from torch import nn

from model import preconditioning


class VelocityDenoiser(nn.Module):
    """D(x; sigma) = x_t - t v(x_t, t), for `GuidanceModel`, `UnifiedModel` and the samplers. It has no feature maps.

    velocity:   a module, called as `velocity(x_t, t, class_labels)` with t `[B]`, that predicts dx_t/dt `[B, C, H, W]`
    data_at:    the time of clean images: 0 (x_t = (1 - t) x0 + t n, v = n - x0, as in SD3 and diffusers), or 1 (x_t = t
                x0 + (1 - t) n, v = x0 - n, as in Lipman et al. 2022, arXiv 2210.02747)
    time_scale: t runs from 0 to this: 1, or 1000 as in diffusers
    """

    prediction = "flow"

    def __init__(self, velocity, data_at=0, time_scale=1.0):
        super().__init__()
        self.velocity, self.data_at, self.time_scale = velocity, data_at, time_scale

    def forward(self, x, sigma, class_labels=None):
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1).expand(len(x))
        c_skip, c_out, c_in, _ = preconditioning(sigma.reshape(-1, 1, 1, 1), prediction="flow")
        t = sigma / (1 + sigma)
        if self.data_at == 0:
            return c_skip * x + c_out * self.velocity(c_in * x, self.time_scale * t, class_labels)
        return c_skip * x - c_out * self.velocity(c_in * x, self.time_scale * (1 - t), class_labels)
