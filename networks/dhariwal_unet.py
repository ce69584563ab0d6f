"""DhariwalUNet: the network of EDM's ImageNet-64 teacher, for imported weights.

It is the ADM of Dhariwal and Nichol 2021 (arXiv 2105.05233) with EDM's preconditioning.
"""

import torch
import torch.nn.functional as F
from torch import nn

from networks.unet import UNet


class DhariwalUNet(UNet):
    """ADM. The defaults are the ImageNet-64 teacher. EDM's label dropout, for classifier-free guidance, is left out."""

    def __init__(
        self,
        img_resolution=64,
        img_channels=3,
        label_dim=1000,
        model_channels=192,
        channel_mult=(1, 2, 3, 4),
        channel_mult_emb=4,
        num_blocks=3,
        attn_resolutions=(32, 16, 8),
        dropout=0.1,
        sigma_data=0.5,
    ):
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__(**arguments)
        emb_channels = model_channels * channel_mult_emb
        half = model_channels // 2  # from 1 to nearly 1/10000 radian per unit of ln(sigma)/4
        self.register_buffer("freqs", (1 / 10000) ** (torch.arange(half) / half), persistent=False)
        self.embed_hidden = nn.Linear(model_channels, emb_channels)
        self.embed_out = nn.Linear(emb_channels, emb_channels)
        self.embed_class = nn.Linear(label_dim, emb_channels, bias=False) if label_dim else None
        self.build(adm=True)

    def embed(self, c_noise, class_labels):
        angle = c_noise * self.freqs
        emb = self.embed_out(F.silu(self.embed_hidden(torch.cat([angle.cos(), angle.sin()], dim=1))))
        if self.embed_class:
            emb = emb + self.embed_class(class_labels)
        return F.silu(emb)
