"""The critic: the fake score, an online denoiser of what the generator makes, with realism heads on an encoder.

Shapes: B batch, C, H, W of the tapped features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dmd2.errors import UserError
from dmd2.method.denoiser import Cond, Denoiser
from dmd2_kernels import GroupNormSiLU


class RealismHead(nn.Sequential):
    """One logit per sample from features of an encoder: (B, C, H, W) -> (B,), in float32.

    Convolutions of stride 2 down to 4x4, one to 1x1, a linear read-out; GroupNorm and SiLU between (the released
    code's `cls_pred_branch`, whose parameter names this keeps). Features that are 4x4 already get a 3x3
    convolution first, so that the head is never linear up to its last norm.
    """

    def __init__(self, feature_shape: tuple[int, int, int]):
        channels, height, width = feature_shape
        if height != width or height < 4 or height & (height - 1):
            raise UserError(
                f"a GAN needs square features of 4, 8, 16, ... pixels, and this teacher's are {feature_shape}; choose "
                f"data.resolution and network.channel_mult for that, fewer gan_taps, or a run without a GAN"
            )
        num_halvings = (height // 4).bit_length() - 1
        groups = max(g for g in range(1, min(32, max(1, channels // 4)) + 1) if channels % g == 0)
        layers: list[nn.Module] = []

        def stage(conv: nn.Conv2d) -> None:
            # SiLU lives inside the norm; the Identity keeps the released indices 0, 1, 3, 4, 6.
            layers.extend([conv, GroupNormSiLU(channels, groups), nn.Identity()])

        for _ in range(num_halvings):
            stage(nn.Conv2d(channels, channels, 4, stride=2, padding=1))
        if num_halvings == 0:
            stage(nn.Conv2d(channels, channels, 3, padding=1))
        stage(nn.Conv2d(channels, channels, 4, stride=4))
        layers.append(nn.Conv2d(channels, 1, 1))
        super().__init__(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, C, H, W) -> logits (B,)."""
        return super().forward(features.float()).flatten()


class Critic(nn.Module):
    """Fake score and, where a GAN takes part, realism logits, in one forward so that wrappers see one entry point.

    A head each judges the first `num_taps` features of an encoder, the coarsest first; with 0 taps there is no GAN.
    """

    def __init__(self, fake: Denoiser, *, num_taps: int):
        super().__init__()
        fake.check_taps(num_taps)
        self.fake = fake
        self.heads = nn.ModuleList(RealismHead(shape) for shape in fake.feature_shapes[:num_taps])

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        cond: Cond,
        *,
        num_denoise: int,
        logits_from: int | None = None,
        features: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x0 estimates of the first `num_denoise` samples, and logits of those from index `logits_from` on.

        x (B, ...), sigma (B,) -> x0_fake (num_denoise, ...), logits (B - logits_from, num_taps) or None. With
        `features` of another network the heads judge those instead of the fake score's own: logits (N, num_taps).
        """
        if logits_from is None and features is None:
            return self.fake(x[:num_denoise], sigma[:num_denoise], cond), None
        if not self.heads:
            raise ValueError("this critic was built without a realism head")
        if features is not None:
            x0_fake = self.fake(x[:num_denoise], sigma[:num_denoise], cond) if num_denoise else x[:0].detach()
            return x0_fake, self._judge(features)
        x0_fake, own = self.fake.denoise_and_tap(x, sigma, cond, num_denoise, len(self.heads))
        return x0_fake, self._judge([feature[logits_from:] for feature in own])

    def _judge(self, features: Sequence[Tensor]) -> Tensor:
        return torch.stack([head(feature) for head, feature in zip(self.heads, features, strict=True)], dim=1)
