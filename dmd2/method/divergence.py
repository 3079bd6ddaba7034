"""Weights of samples in the matching loss for an f-divergence other than the reverse KL (f-distill, arXiv 2502.15681).

Shapes: B batch, K realism heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dmd2.method.noise import NoiseGrid
from dmd2.training import ranks

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {"js": lambda r: r / (1 + r), "kl": lambda r: r}
"""h of r = p_data / p_gen (table 1 there): Jensen-Shannon, and the forward KL."""
BINS = 10
"""Ranges of noise levels in which the ratio is relative to its mean."""
LARGEST_LOGIT = 10.0


@torch.no_grad()
def sample_weights(logits: Tensor, sigma: Tensor, grid: NoiseGrid, divergence: str) -> Tensor:
    """h of each sample, float32 (B,), with mean 1 over the batches of all ranks. Collective.

    logits (B, K) of D at the noised samples, sigma (B,) their levels on the grid. r = exp(mean logit) is divided by its
    mean over the samples of all ranks in the same tenth of the grid, since D separates better at lower noise. The
    published code has a running mean over batches there; a batch's own needs no state.
    """
    ratio = logits.float().mean(1).clamp(-LARGEST_LOGIT, LARGEST_LOGIT).exp()
    place = torch.searchsorted(grid.sigmas.to(sigma.dtype), sigma).clamp(max=len(grid.sigmas) - 1)
    bins = torch.arange(BINS, device=sigma.device) == (place * BINS // len(grid.sigmas))[:, None]  # (B, BINS)
    member = bins.float()
    count, total = ranks.total(torch.stack([member.sum(0), ratio @ member]))
    h = WEIGHTS[divergence](ratio / (member @ (total / count.clamp(min=1.0))))
    return h / (ranks.total(h.sum()) / count.sum())
