"""Changes of pairs of digits that keep their composition, for the training of the pair classifier.

Shapes: B batch, 1 channel, 16 pixels high, each digit's half 8 pixels wide; values in [-1, 1], the ground is -1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

ROTATION = 0.3  # radians
SCALE = 0.15
SHEAR = 0.1
SHIFT = 1.0  # pixels


def augmented(x: Tensor, compositions: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (B, 1, 16, 16) and their compositions (B,), 10 * left + right, with right halves of other images.

    Each digit is rotated, scaled, sheared and shifted by uniform amounts up to the constants of this module.
    """
    order = torch.randperm(len(x), generator=rng).to(x.device)
    left, right = x.chunk(2, dim=3)
    halves = warped(torch.cat([left, right[order]]), rng)
    mixed = compositions // 10 * 10 + compositions[order] % 10
    return torch.cat(halves.chunk(2), dim=3), mixed


def warped(halves: Tensor, rng: torch.Generator) -> Tensor:
    """Digits (B, 1, 16, 8), each changed about its own centre of mass in height, with bilinear interpolation."""
    num = len(halves)

    def uniform(most: float) -> Tensor:
        return (2 * torch.rand(num, generator=rng) - 1).to(halves.device) * most

    angle, scale, shear = uniform(ROTATION), 1 + uniform(SCALE), uniform(SHEAR)
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    rows = torch.linspace(-15 / 16, 15 / 16, 16, device=halves.device)
    mass = (halves + 1).sum((1, 3))  # (B, 16)
    middle = (mass * rows).sum(1) / mass.sum(1).clamp_min(1e-6)
    across, along = 2 * (shear - sine), sine / 2  # a half is twice as high as it is wide
    x = torch.stack([cosine, across, uniform(SHIFT / 4) - across * middle], dim=1)
    y = torch.stack([along, cosine, uniform(SHIFT / 8) + middle - cosine * middle], dim=1)
    grid = F.affine_grid(torch.stack([x, y], dim=1), list(halves.shape), align_corners=False)
    return F.grid_sample(halves + 1, grid, align_corners=False) - 1
