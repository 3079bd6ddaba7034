"""`lpips_diversity`: how different the samples of one prompt are (paper, table 6).

The mean LPIPS over all pairs of a prompt's samples, and over the prompts; the paper takes four samples of each of 128
prompts. Larger samples are first resized to 512 pixels with a Lanczos filter, as in the released code. Which LPIPS that
code was called with is not published: this one has VGG-16 and the weights of the package `lpips`, so the figure is
comparable with the paper's only up to that choice.
"""

from __future__ import annotations

from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dmd2.errors import UserError
from dmd2.metrics.context import Context
from dmd2.metrics.distances import Device
from dmd2.metrics.images import Images, as_vectors, resized
from dmd2.metrics.measure import Batch, Draw, Labelled
from dmd2.metrics.perceptual import load_network

SIDE = 512
MAX_IMAGES = 512  # of a block: 128 prompts with four samples each; bounds the memory


class PerceptualDiversity:
    """The measure, of the first `MAX_IMAGES` samples of a block; samples of a prompt need not be neighbours."""

    def __init__(self, context: Context) -> None:
        self._weights, self._device = context.evaluation.vgg_weights, context.device

    def observe(self, batch: Batch) -> Labelled:
        """The first images of the block."""
        images = batch.whole[0][: max(0, MAX_IMAGES - batch.first)]
        large = min(images.shape[1:3]) > SIDE
        return Labelled(resized(images, SIDE) if large else images, batch.labels[: len(images)].astype(np.str_))

    def value(self, sums: Labelled) -> dict[str, float]:
        """The mean distance. Raises UserError if no prompt has two samples."""
        return {"lpips_diversity": mean_distance(sums, self._network, self._device)}

    @cached_property
    def _network(self) -> nn.Module:
        if self._weights is None:
            raise UserError("evaluation.vgg_weights is not set, and lpips_diversity needs torchvision's VGG-16")
        return load_network(self._weights, self._device, key="evaluation.vgg_weights")

    def floor(self, draw: Draw) -> dict[str, float]:
        """Nothing: most data has one image of a caption."""
        del draw
        return {}


@torch.no_grad()
def mean_distance(samples: Labelled, network: Any, device: Device = "cpu") -> float:
    """The mean over prompts of the mean LPIPS of a prompt's pairs; prompts with one sample do not count.

    `network` takes two batches (B, 3, H, W) in [-1, 1]. Raises UserError if no prompt has two samples.
    """
    means = []
    for text in np.unique(samples.texts):
        x = _prepared(samples.images[samples.texts == text], device)
        pairs = [network(x[i : i + 1], x[j : j + 1]) for i, j in combinations(range(len(x)), 2)]
        if pairs:
            means.append(float(torch.stack(pairs).double().mean()))
    if not means:
        raise UserError(
            f"lpips_diversity: none of the first {len(samples.texts)} samples of a block have the same prompt; give "
            f"evaluation.prompts fewer prompts, such as 128 with num_samples 512"
        )
    return float(np.mean(means))


def _prepared(images: Images, device: Device) -> Tensor:
    x = torch.from_numpy(as_vectors(images).reshape(images.shape)).permute(0, 3, 1, 2)
    return x.expand(-1, 3, -1, -1).to(device)
