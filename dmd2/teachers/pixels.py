"""Codec and conditioner of class-conditional teachers in pixel space.

Shapes: B batch, H, W, C image height, width, channels; L grey levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmd2.config import Data
from dmd2.errors import UserError
from dmd2.method.denoiser import Cond

OFF_GRID = 255  # no level of a codec that has fewer than 256


class PixelCodec:
    """Images with L = `levels` equally spaced grey levels as x0 in [-1, 1]; implements `denoiser.Codec`.

    Level k is round(255 k / (L - 1)) in images, uint8 (B, H, W, C); k in storage, uint8 (B, C, H, W); and
    2 k / (L - 1) - 1 in x0, float32 (B, C, H, W). Raises ValueError unless 2 <= L <= 256.
    """

    min_psnr: float | None = None

    def __init__(self, levels: int, channels: int):
        if not 2 <= levels <= 256:
            raise ValueError(f"levels {levels} must be in 2..256")
        self.levels, self.channels = levels, channels
        self._half = (levels - 1) / 2
        self._grey = np.rint(np.arange(levels) * 255 / (levels - 1)).astype(np.uint8)  # (L,)
        self._level = np.full(256, OFF_GRID, np.uint8)
        self._level[self._grey] = np.arange(levels)

    def to(self, device: torch.device | str) -> PixelCodec:
        """Itself: it has no network."""
        return self

    def encode(self, images: np.ndarray, ids: Sequence[int] | range = ()) -> np.ndarray:
        """uint8 images (B, H, W, C) -> levels (B, C, H, W). Raises UserError for a value that is not a level."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != self.channels:
            raise UserError(
                f"images are {images.dtype} {images.shape}; expected uint8 (B, H, W, {self.channels}): "
                f"correct `data.channels` or the source"
            )
        stored = self._level[images]
        if self.levels < 256 and (stored == OFF_GRID).any():
            value = images[stored == OFF_GRID][0]
            raise UserError(f"pixel value {value} is not one of {self.levels} grey levels; set `data.levels` to 256")
        return np.ascontiguousarray(stored.transpose(0, 3, 1, 2))

    def load(self, stored: np.ndarray) -> Tensor:
        """Levels (B, C, H, W) -> x0 = 2 k / (L - 1) - 1."""
        return torch.tensor(stored, dtype=torch.float32).div_(self._half).sub_(1.0)

    def decode(self, x0: Tensor, *, rounding: str = "round") -> np.ndarray:
        """x0 (B, C, H, W) -> uint8 images (B, H, W, C) of the codec's levels, clamped to their range.

        "round" is the nearest level, floor(x0 (L - 1) / 2 + L / 2): for L = 256 EDM's truncated 127.5 x0 + 128.
        "truncate" is the level below, floor((x0 + 1) (L - 1) / 2): for L = 256 DMD2's truncated 127.5 (x0 + 1).
        Raises UserError if x0 contains NaN.
        """
        x0 = x0.detach().float()
        if torch.isnan(x0).any():
            raise UserError(
                "samples contain NaN: the network diverged; lower its learning rate or use an earlier export"
            )
        if rounding == "round":
            level = x0 * self._half + self.levels / 2
        elif rounding == "truncate":
            level = (x0 + 1) * self._half
        else:
            raise ValueError(f"rounding is {rounding!r}; use 'round' or 'truncate'")
        index = level.clamp(0, self.levels - 1).to(torch.uint8).permute(0, 2, 3, 1)  # the cast truncates
        return self._grey[index.cpu().numpy()]


class ClassConditioner:
    """Class labels as the condition `label`, int64 (B,); implements `denoiser.Conditioner`."""

    def __init__(self, num_classes: int):
        self.num_classes = num_classes

    def to(self, device: torch.device | str) -> ClassConditioner:
        """Itself: it has no network."""
        return self

    def tokenize(self, labels: Sequence[Any]) -> Cond:
        """The tokens of integer labels. Raises UserError for one outside [0, num_classes)."""
        label = torch.as_tensor(np.asarray(labels, dtype=np.int64))
        if len(label) and not 0 <= int(label.min()) <= int(label.max()) < self.num_classes:
            raise UserError(
                f"labels span {int(label.min())}..{int(label.max())}, but `data.num_classes` is {self.num_classes}; "
                f"correct it or the source"
            )
        return {"label": label}

    def embed(self, tokens: Cond) -> Cond:
        """The tokens: the network embeds them itself."""
        return tokens

    def draw(self, num: int, rng: torch.Generator) -> Cond:
        """`num` uniform random labels, on the generator's device."""
        return {"label": torch.randint(self.num_classes, (num,), generator=rng, device=rng.device)}

    def null(self, cond: Cond) -> Cond | None:
        """None: EDM's class-conditional networks have no unconditional input."""
        return None


def pixel_space(data: Data) -> tuple[PixelCodec, ClassConditioner]:
    """The codec and conditioner of a class-conditional teacher in pixel space."""
    return PixelCodec(data.levels, data.channels), ClassConditioner(data.classes)
