"""Statistics of generated samples for the log. Shapes: B batch, `...` the shape of one sample."""

from __future__ import annotations

import torch
from torch import Tensor


def describe(x0: Tensor, *, in_pixels: bool) -> dict[str, Tensor]:
    """Statistics of generated samples x0 (B, ...), and a measure of mode collapse.

    Of images: their mean (the paper's figure 8) and the fraction of |x0| > 1. Of latents: their mean and deviation.

    `neighbour_ratio` is the mean distance to the nearest other sample of the batch over the mean distance of all
    pairs: it falls towards 0 when a generator collapses to a few images.
    """
    distances = torch.cdist(x0.flatten(1), x0.flatten(1))
    num = x0.shape[0]
    if in_pixels:
        health = {"brightness": x0.mean(), "saturated": (x0.abs() > 1).float().mean()}
    else:
        health = {"latent_mean": x0.mean(), "latent_std": x0.std()}
    if num > 1:
        nearest = (distances + torch.diag(torch.full((num,), float("inf"), device=x0.device))).min(dim=1).values
        health["neighbour_ratio"] = nearest.mean() / (distances.sum() / (num * (num - 1))).clamp(min=1e-12)
    return health
