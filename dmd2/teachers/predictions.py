"""What a network predicts, in the project's noise coordinate x = x0 + sigma * eps.

A network sees c_in * x at a timestep and returns `out`; the estimate is x0 = a * x + k * out (a `LinearHead`).

Shapes: B batch, T number of discrete levels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmd2_kernels import LinearHead

FLOW = "flow"
PREDICTIONS = ("epsilon", "v_prediction", "sample", FLOW)


def input_scale(prediction: str, sigma: Tensor) -> Tensor:
    """c_in of sigma (B,): the network's input is c_in * x.

    A variance-preserving process has x_t = sqrt(abar) x0 + sqrt(1 - abar) eps, so c_in = sqrt(abar) =
    1 / sqrt(1 + sigma^2). The straight path of flow matching is x_t = (1 - t) x0 + t eps, so c_in = 1 - t =
    1 / (1 + sigma).
    """
    return 1 / (1 + sigma) if prediction == FLOW else (1 + sigma.square()).rsqrt()


def linear_head(prediction: str, sigma: Tensor) -> LinearHead:
    """a and k (B,) of x0 = a * x + k * out, in the dtype of sigma (B,).

    epsilon         x0 = x - sigma * out
    v_prediction    out = sqrt(abar) eps - sqrt(1 - abar) x0 (arXiv 2202.00512, appendix D):
                    x0 = (x - sigma * sqrt(1 + sigma^2) * out) / (1 + sigma^2)
    sample          x0 = out
    flow            out = eps - x0 (arXiv 2403.03206): x0 = (x - sigma * out) / (1 + sigma)
    """
    if prediction == "epsilon":
        return LinearHead(torch.ones_like(sigma), -sigma)
    if prediction == "v_prediction":
        scale = (1 + sigma.square()).rsqrt()
        return LinearHead(scale.square(), -sigma * scale)
    if prediction == "sample":
        return LinearHead(torch.zeros_like(sigma), torch.ones_like(sigma))
    if prediction == FLOW:
        scale = 1 / (1 + sigma)
        return LinearHead(scale, -sigma * scale)
    raise ValueError(f"prediction is {prediction!r}; known: {', '.join(PREDICTIONS)}")


def boundaries(sigmas: Tensor) -> Tensor:
    """The geometric means (T - 1,) of neighbouring levels, which separate the levels in `timestep`."""
    return (sigmas[1:] * sigmas[:-1]).sqrt()


def guidance_embedding(scale: float, width: int) -> Tensor:
    """The embedding of a guidance scale that conditions a latent consistency model: (1, width), float32 on the CPU.

    Sines and cosines of 1000 (scale - 1) at width / 2 frequencies from 1 to 1e-4 (arXiv 2310.04378, section 4.2).
    """
    half = width // 2
    with torch.device("cpu"):
        frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10_000) / (half - 1)))
        angles = 1000 * (scale - 1) * frequencies
        return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()]), (0, width % 2))[None]


def timestep(prediction: str, sigma: Tensor, limits: Tensor) -> Tensor:
    """The timestep (B,) that the network gets at sigma (B,).

    That is the index of the level nearest to sigma on a logarithmic scale, with `limits` = `boundaries(sigmas)`; for
    flow matching T * t, with t = sigma / (1 + sigma), which need not be whole.
    """
    if prediction == FLOW:
        return (len(limits) + 1) * sigma / (1 + sigma)
    return torch.bucketize(sigma, limits.to(sigma.dtype))
