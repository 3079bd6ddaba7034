"""Types of the ops: the per-sample head of a network, and a named tuple per loss.

Shapes: B batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def _scalars(*values: Tensor | float) -> list[Tensor]:
    """The values as tensors of one dtype, at least float32, on one device."""
    device = next((v.device for v in values if isinstance(v, Tensor)), torch.device("cpu"))
    wide = any(isinstance(v, Tensor) and v.dtype == torch.float64 for v in values)
    return [torch.as_tensor(v, dtype=torch.float64 if wide else torch.float32, device=device) for v in values]


class LinearHead(NamedTuple):
    """The conversion of a raw network output at noisy x to an image: x0 = a_b * x + k_b * out, per sample b."""

    a: Tensor  # (B,) fp32
    k: Tensor  # (B,) fp32

    @classmethod
    def edm(cls, sigma: Tensor, sigma_data: float) -> "LinearHead":
        """EDM preconditioning (arXiv 2206.00364, table 1): a = c_skip, k = c_out."""
        (sigma,) = _scalars(sigma)
        variance = sigma.square() + sigma_data**2
        return cls(sigma_data**2 / variance, sigma * sigma_data * variance.rsqrt())

    @classmethod
    def epsilon(cls, alpha: Tensor | float, sigma: Tensor) -> "LinearHead":
        """Noise prediction, x = alpha * x0 + sigma * eps: a = 1 / alpha, k = -sigma / alpha."""
        alpha, sigma = _scalars(alpha, sigma)
        return cls((1 / alpha).expand_as(sigma), -sigma / alpha)

    @classmethod
    def v(cls, alpha: Tensor, sigma: Tensor) -> "LinearHead":
        """v prediction (arXiv 2202.00512, appendix D), alpha^2 + sigma^2 = 1: a = alpha, k = -sigma."""
        alpha, sigma = _scalars(alpha, sigma)
        return cls(alpha, -sigma)

    @classmethod
    def flow(cls, t: Tensor) -> "LinearHead":
        """Velocity eps - x0 of the straight path x = (1 - t) * x0 + t * eps: a = 1, k = -t."""
        (t,) = _scalars(t)
        return cls(torch.ones_like(t), -t)


class MatchingLoss(NamedTuple):
    """The distribution-matching loss and values for the log."""

    loss: Tensor  # () with gradient to x0 only
    weight: Tensor  # (B,) mean |x0 - x0_real|
    sq_norm: Tensor  # (B,) sum g^2, before a per-sample factor
    num_nonfinite: Tensor  # (B,) int64, elements of g that were NaN or infinite


class MatchingSums(NamedTuple):
    """What the matching gradient's kernel sums beside it, per sample or chunk: K is the implementation's choice.

    A property forms its value when it is read, in an operation of its own.
    """

    terms: Tensor  # (T,) parts of the loss, which is their sum
    weight: Tensor  # (B,) mean |x0 - x0_real|
    squares: Tensor  # (B, K) sum g^2, before a per-sample factor
    nonfinite: Tensor  # (B, K) int64, elements of g that were NaN or infinite

    @property
    def loss(self) -> Tensor:
        """The loss, ()."""
        return _total(self.terms)

    @property
    def sq_norm(self) -> Tensor:
        """sum g^2 of each sample, (B,)."""
        return _rows(self.squares)

    @property
    def num_nonfinite(self) -> Tensor:
        """The non-finite elements of each sample, (B,) int64."""
        return _rows(self.nonfinite)


class DenoisingLoss(NamedTuple):
    """The weighted denoising loss, and its value per sample."""

    loss: Tensor  # () with gradient to out only
    per_sample: Tensor  # (B,) detached; its mean is the loss


class DenoisingSums(NamedTuple):
    """What the denoising gradient's kernel sums beside it."""

    terms: Tensor  # (T,) parts of the loss, which is their sum

    @property
    def loss(self) -> Tensor:
        """The loss, ()."""
        return _total(self.terms)


class GanCriticLoss(NamedTuple):
    """The critic's GAN loss, and its probabilities of being real."""

    loss: Tensor  # () with gradients to all logits
    p_data: Tensor  # (B,) sigmoid of the data logits, detached
    p_gen: Tensor  # (B,) sigmoid of the generated logits, detached
    r1: Tensor  # () mean (perturbed - data)^2 before its weight, detached; 0 without perturbed logits


class GanCriticSums(NamedTuple):
    """What the critic's GAN gradients' kernel sums beside them."""

    terms: Tensor  # (T,) parts of the loss, which is their sum
    correct: Tensor  # (T,) parts of the accuracy: the mean share of data logits above 0 and generated ones below
    r1_terms: Tensor  # (T,) parts of mean (perturbed - data)^2, before its weight; 0 without perturbed logits

    @property
    def loss(self) -> Tensor:
        """The loss, ()."""
        return _total(self.terms)

    @property
    def accuracy(self) -> Tensor:
        """The accuracy, (), from 0 to 1."""
        return _total(self.correct)

    @property
    def r1(self) -> Tensor:
        """mean (perturbed - data)^2, ()."""
        return _total(self.r1_terms)


class CriticGradients(NamedTuple):
    """The gradients of the critic's GAN loss, each in the shape and dtype of its logits."""

    gen: Tensor
    data: Tensor
    perturbed: Tensor | None


class GanGeneratorLoss(NamedTuple):
    """The generator's GAN loss, and the critic's probabilities of being real."""

    loss: Tensor  # () with gradient to the logits
    p_gen: Tensor  # (B,) detached


class GanGeneratorSums(NamedTuple):
    """What the generator's GAN gradient's kernel sums beside it."""

    terms: Tensor  # (T,) parts of the loss, which is their sum

    @property
    def loss(self) -> Tensor:
        """The loss, ()."""
        return _total(self.terms)


def _total(parts: Tensor) -> Tensor:
    """The sum () of (T,); a view of a single one."""
    return parts[0] if len(parts) == 1 else parts.sum()


def _rows(table: Tensor) -> Tensor:
    """The sums (B,) of (B, K); a view if K is 1."""
    return table[:, 0] if table.shape[1] == 1 else table.sum(1)
