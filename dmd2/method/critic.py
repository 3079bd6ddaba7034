"""The critic: the fake score, a denoiser trained online on generated samples, with realism heads (GAN) on an encoder.

Shapes: B batch, (C, H, W) one tapped feature map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dmd2.errors import UserError
from dmd2.method.denoiser import Cond, Denoiser, Prediction, first
from dmd2_kernels import GroupNormSiLU, folds


class RealismHead(nn.Sequential):
    """One logit per sample from encoder features: (B, C, H, W) -> (B,), in float32.

    Convolutions of stride 2 down to 4x4, one to 1x1, a linear output layer, each but the last with GroupNorm and SiLU
    (`cls_pred_branch` of the released code, with the same parameter names). 4x4 features get a 3x3 convolution first,
    so that the head is never linear up to its last norm. Raises UserError unless H = W is a power of two and >= 4.
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
            # SiLU is fused into the norm; the Identity keeps the released indices 0, 1, 3, 4, 6.
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
        x = features.float()
        if not folds(x):
            return super().forward(x).flatten()
        *stages, last = self.children()
        for conv, norm in zip(stages[::3], stages[1::3], strict=True):
            assert isinstance(conv, nn.Conv2d)
            x = norm(conv._conv_forward(x, conv.weight, None), channel_bias=conv.bias)
        out: Tensor = last(x)
        return out.flatten()


class Critic(nn.Module):
    """Fake score and, with a GAN, realism logits, in one `forward` so that wrappers (FSDP) see one entry point.

    One head per tap, on the first `num_taps` encoder features, coarsest first; with 0 taps there is no GAN.
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
    ) -> tuple[Prediction, Tensor | None]:
        """Predictions of samples [:num_denoise] and logits of samples [logits_from:].

        x (B, ...), sigma (B,) -> prediction of (num_denoise, ...), logits (B - logits_from, num_taps) or None. With
        `features` of another network the heads get those instead of the fake score's own: logits (N, num_taps).
        Raises ValueError if logits are requested from a critic without heads.
        """
        if logits_from is None and features is None:
            return self._predict(x, sigma, cond, num_denoise), None
        if not self.heads:
            raise ValueError("this critic was built without a realism head")
        if features is not None:
            return self._predict(x, sigma, cond, num_denoise), self._judge(features)
        prediction, own = self.fake.predict_and_tap(x, sigma, cond, num_denoise, len(self.heads))
        return prediction, self._judge([feature[logits_from:] for feature in own])

    def _predict(self, x: Tensor, sigma: Tensor, cond: Cond, num: int) -> Prediction:
        """The fake score's prediction of the first `num` samples."""
        if num == 0:
            return Prediction(x[:0].detach())
        return self.fake.predict(x[:num], sigma[:num], first(cond, num))

    def _judge(self, features: Sequence[Tensor]) -> Tensor:
        return torch.stack([head(feature) for head, feature in zip(self.heads, features, strict=True)], dim=1)
