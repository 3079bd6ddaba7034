"""The ADM U-Net (Dhariwal and Nichol 2021) as trained by EDM, with EDM's parameter names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dmd2.config import Network
from dmd2.errors import UserError
from dmd2.teachers.edm_blocks import Block, UNetBase, check_size, decoder, encoder, waves
from dmd2.teachers.edm_layers import ADM, Conv, LabelEmbedding, Linear, Resampling, norm


class UNet(UNetBase):
    """EDM's `DhariwalUNet`, the network of its ImageNet-64 model."""

    def __init__(self, network: Network, resolution: int, num_channels: int, num_classes: int):
        super().__init__()
        check_size(network, resolution)
        num_emb = network.model_channels * network.channel_mult_emb
        num_first = network.model_channels * network.channel_mult[0]
        self.num_frequencies = network.model_channels // 2
        self.map_layer0 = Linear(network.model_channels, num_emb)
        self.map_layer1 = Linear(num_emb, num_emb)
        self.map_label = LabelEmbedding(num_classes, num_emb)

        def make(num_in: int, num_out: int, *, attention: bool = False, resampling: Resampling | None = None) -> Block:
            heads = _heads(network, num_out) if attention else 0
            return Block(num_in, num_out, num_emb, num_heads=heads, resampling=resampling, dropout=network.dropout)

        self.enc, widths = encoder(network, resolution, Conv(num_channels, num_first, 3), num_first, make)
        self._set_levels(network, resolution, widths)
        self.dec = decoder(network, resolution, widths, make, attend_last=False)
        self.out_norm = norm(num_first)
        self.out_conv = Conv(num_first, num_channels, 3, init=ADM.init_last)

    def embed(self, noise: Tensor, label: Tensor) -> Tensor:
        """See `UNetBase`; cosines first."""
        emb = F.silu(self.map_layer0(torch.cat(waves(noise, self.num_frequencies, endpoint=False), dim=1)))
        return F.silu(self.map_layer1(emb) + self.map_label(label))

    def finish(self, x: Tensor) -> Tensor:
        """See `UNetBase`."""
        out: Tensor = self.out_conv(self.out_norm(x))
        return out


def _heads(network: Network, width: int) -> int:
    """The number of attention heads of a block with `width` channels. Raises UserError unless it is whole."""
    if width % network.channels_per_head:
        raise UserError(
            f"network.channels_per_head {network.channels_per_head} does not divide the {width} channels of a block "
            f"with attention; use a divisor of {width}"
        )
    return width // network.channels_per_head
