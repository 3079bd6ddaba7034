"""The DDPM++ U-Net (Song et al. 2021) in EDM's configuration for CIFAR-10, with EDM's parameter names.

Encoder and decoder are the standard ones of EDM's `SongUNet`; NCSN++'s residual ones are not implemented.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dmd2.config import Network
from dmd2.teachers.edm_blocks import Block, UNetBase, check_size, decoder, encoder, waves
from dmd2.teachers.edm_layers import DDPMPP, Conv, Linear, Resampling, ScaledLabelEmbedding, Unused, norm


class DDPMPlusPlus(UNetBase):
    """EDM's `SongUNet` with the settings `ddpmpp`.

    `map_augment`, EDM's embedding of augmentation parameters, is not used; its weight is a buffer, so that weight decay
    does not change it.
    """

    def __init__(self, network: Network, resolution: int, num_channels: int, num_classes: int):
        super().__init__()
        check_size(network, resolution)
        num_noise, num_emb = network.model_channels, network.model_channels * network.channel_mult_emb
        self.map_label = ScaledLabelEmbedding(num_classes, num_noise, DDPMPP.init)
        if network.augment_dim:
            self.map_augment = Unused(num_noise, network.augment_dim)
        self.map_layer0 = Linear(num_noise, num_emb, DDPMPP.init)
        self.map_layer1 = Linear(num_emb, num_emb, DDPMPP.init)
        self.num_frequencies = num_noise // 2

        def make(num_in: int, num_out: int, *, attention: bool = False, resampling: Resampling | None = None) -> Block:
            return Block(
                num_in,
                num_out,
                num_emb,
                style=DDPMPP,
                num_heads=int(attention),
                resampling=resampling,
                dropout=network.dropout,
            )

        stem = Conv(num_channels, network.model_channels, 3, init=DDPMPP.init)
        self.enc, widths = encoder(network, resolution, stem, network.model_channels, make)
        self._set_levels(network, resolution, widths)
        self.dec = decoder(network, resolution, widths, make, attend_last=True)
        num_last = network.model_channels * network.channel_mult[0]
        self._norm, self._conv = f"{resolution}x{resolution}_aux_norm", f"{resolution}x{resolution}_aux_conv"
        self.dec[self._norm] = norm(num_last, DDPMPP.eps)
        self.dec[self._conv] = Conv(num_last, num_channels, 3, init=DDPMPP.init_last)

    def embed(self, noise: Tensor, label: Tensor) -> Tensor:
        """See `UNetBase`; sines first."""
        cos, sin = waves(noise, self.num_frequencies, endpoint=True)
        emb = F.silu(self.map_layer0(torch.cat([sin, cos], dim=1) + self.map_label(label)))
        return F.silu(self.map_layer1(emb))

    def finish(self, x: Tensor) -> Tensor:
        """See `UNetBase`."""
        out: Tensor = self.dec[self._conv](self.dec[self._norm](x))
        return out
