"""SongUNet: the network of EDM's CIFAR-10 teachers, for imported weights.

They are DDPM++ and NCSN++ of Song et al. 2021 (arXiv 2011.13456) with EDM's preconditioning.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from networks.unet import UNet, lowpass


class SongUNet(UNet):
    """DDPM++ and NCSN++. The defaults are the CIFAR-10 teacher. Arguments are those of `UNet`, and:

    embedding_type:     of the noise level: positional (DDPM++) or fourier (NCSN++)
    channel_mult_noise: its width, in units of `model_channels`: 1 (DDPM++) or 2 (NCSN++)
    encoder_type:       standard (DDPM++), or residual (NCSN++): the noisy image enters at each resolution, downsampled
    resample_filter:    taps of the low-pass filter for down- and upsampling: [1, 1] (DDPM++) or [1, 3, 3, 1] (NCSN++)

    On the way up only the last block of a resolution has attention. EDM's layer for augmentation labels is left out:
    it has no bias, and its input is zero in sampling and distillation.
    """

    def __init__(
        self,
        img_resolution=32,
        img_channels=3,
        label_dim=10,
        model_channels=128,
        channel_mult=(2, 2, 2),
        channel_mult_emb=4,
        num_blocks=4,
        attn_resolutions=(16,),
        dropout=0.13,
        sigma_data=0.5,
        embedding_type="positional",
        channel_mult_noise=1,
        encoder_type="standard",
        resample_filter=(1, 1),
    ):
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__(**arguments)
        noise_channels, emb_channels = model_channels * channel_mult_noise, model_channels * channel_mult_emb
        half = noise_channels // 2
        if embedding_type == "positional":  # 1 to 1/10000 radian per unit of ln(sigma)/4
            self.radians = 1.0
            self.register_buffer("freqs", (1 / 10000) ** (torch.arange(half) / (half - 1)), persistent=False)
        else:  # random, in periods per unit; saved with the weights
            self.radians = 2 * math.pi
            self.register_buffer("freqs", 16 * torch.randn(half))
        self.embed_class = nn.Linear(label_dim, noise_channels) if label_dim else None
        self.embed_hidden = nn.Linear(noise_channels, emb_channels)
        self.embed_out = nn.Linear(emb_channels, emb_channels)
        self.register_buffer("kernel", lowpass(resample_filter), persistent=False)
        self.build(kernel=self.kernel, image_padding=len(resample_filter) // 2 if encoder_type == "residual" else None)

    def embed(self, c_noise, class_labels):
        angle = c_noise * (self.freqs * self.radians)
        emb = torch.cat([angle.sin(), angle.cos()], dim=1)
        if self.embed_class:
            emb = emb + self.embed_class(class_labels * math.sqrt(self.label_dim))  # of unit mean square
        return F.silu(self.embed_out(F.silu(self.embed_hidden(emb))))
