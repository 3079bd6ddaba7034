"""An exact teacher: the closed-form x0-denoiser of a Gaussian mixture, for tests and small demonstrations.

Class c has M modes N(mean_cm, std_cm^2 I) with weights w_cm. After x = x0 + sigma eps, mode m has the density
N(mean_cm, v_cm I) with v_cm = std_cm^2 + sigma^2, from which the formulas below follow.

Shapes: B batch, K classes, M modes per class, N elements of a sample, F features.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmd2 import config
from dmd2.method.denoiser import Cond, Denoiser, Teacher
from dmd2.method.noise import NoiseGrid, expand
from dmd2.teachers.edm_layers import LabelEmbedding, Linear
from dmd2.teachers.pixels import ClassConditioner, PixelCodec
from dmd2.teachers.weights import load_weights
from dmd2.training.rng import normal

MODE_WEIGHTS = (0.7, 0.3)
MODE_STD = 0.1
FREQUENCIES = (1.0, 2.0, 4.0, 8.0)
WIDTH = 64


class GaussianMixture(nn.Module):
    """A class-conditional mixture of isotropic Gaussians with its noised densities, in the dtype of x.

    means (K, M, N), stds (K, M) and weights (K, M), whose rows sum to 1. Samples x are (B, ...) of N elements each.
    """

    means: Tensor
    stds: Tensor
    weights: Tensor

    def __init__(self, means: Tensor, stds: Tensor, weights: Tensor):
        super().__init__()
        if not means.shape[:2] == stds.shape == weights.shape:
            shapes = [tuple(t.shape) for t in (means, stds, weights)]
            raise ValueError(f"means, stds and weights are {shapes}; they must be (K, M, N), (K, M) and (K, M)")
        self.register_buffer("means", means)
        self.register_buffer("stds", stds)
        self.register_buffer("weights", weights)

    def _log_terms(self, x: Tensor, sigma: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log w_m N(x; mean_m, v_m I) as (B, M), with stds^2 (B, M) and means (B, M, N) of each sample's class."""
        means, square = self.means.to(x.dtype)[label], self.stds.to(x.dtype)[label].square()
        v = square + sigma.to(x.dtype)[:, None].square()
        distance = (x.flatten(1)[:, None] - means).square().sum(-1)  # (B, M)
        log_normal = -0.5 * (distance / v + means.shape[-1] * torch.log(2 * math.pi * v))
        return self.weights.to(x.dtype)[label].log() + log_normal, square, means

    def log_density(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        """log p_sigma(x | label): (B, ...), (B,), (B,) -> (B,)."""
        return self._log_terms(x, sigma, label)[0].logsumexp(1)

    def posterior_mean(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        """E[x0 | x, label], in x's shape.

        With r_m = p(m | x), the softmax of the modes' log terms:
        E[x0 | x] = sum_m r_m (std_m^2 x + sigma^2 mean_m) / (std_m^2 + sigma^2)
        """
        log_terms, square, means = self._log_terms(x, sigma, label)
        keep = square / (square + sigma.to(x.dtype)[:, None].square())  # (B, M)
        modes = torch.lerp(means, x.flatten(1)[:, None].expand_as(means), keep[:, :, None])
        return (log_terms.softmax(1)[:, :, None] * modes).sum(1).view(x.shape)

    def score(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        """The gradient of log p_sigma(x | label) with respect to x, by Tweedie's formula: (E[x0 | x] - x) / sigma^2."""
        return (self.posterior_mean(x, sigma, label) - x) / expand(sigma.to(x.dtype), x).square()

    def sample(self, label: Tensor, rng: torch.Generator) -> Tensor:
        """One x0 for each label: (B,) -> (B, N)."""
        mode = torch.multinomial(self.weights[label], 1, generator=rng)[:, 0]
        means = self.means[label, mode]
        return means + self.stds[label, mode, None] * normal(means.shape, rng)


class MixtureDenoiser(Denoiser):
    """The exact denoiser plus c_out times a small network whose output is initially zero.

    A teacher is frozen and so exact; a copy (DMD2's generator or critic) starts equal to it and trains the network. The
    tap is the network's last hidden layer as (F, 4, 4), since realism heads need feature maps.
    """

    def __init__(
        self, mixture: GaussianMixture, sample_shape: tuple[int, ...], sigma_data: float, num_features: int = 16
    ):
        super().__init__()
        num_classes, _, num = mixture.means.shape
        if num != math.prod(sample_shape):
            raise ValueError(f"means have {num} elements, but a sample of shape {sample_shape} has another number")
        self.mixture, self.sample_shape, self.sigma_data = mixture, tuple(sample_shape), sigma_data
        self.feature_shapes = ((num_features, 4, 4),)
        self.first = Linear(num + 2 * len(FREQUENCIES), WIDTH)
        self.label = LabelEmbedding(num_classes, WIDTH)
        self.second = Linear(WIDTH, 16 * num_features)
        self.last = Linear(16 * num_features, num)

    def reset(self, rng: torch.Generator) -> None:
        """Initialises the network; its last layer is zero."""
        for layer in (self.first, self.label, self.second):
            layer.reset(rng)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def denoise_and_tap(
        self, x: Tensor, sigma: Tensor, cond: Cond, num_denoise: int, num_taps: int = 1
    ) -> tuple[Tensor, list[Tensor]]:
        """See `Denoiser`; c_in, c_out and c_noise are EDM's (Karras et al. 2022, table 1)."""
        self.check_taps(num_taps)
        label = cond["label"]
        inverse = (sigma.square() + self.sigma_data**2).rsqrt()  # c_in
        angles = torch.outer(sigma.log() / 4, torch.tensor(FREQUENCIES, device=sigma.device))
        inputs = torch.cat([inverse[:, None] * x.flatten(1), angles.cos(), angles.sin()], dim=1)
        hidden = F.silu(self.second(F.silu(self.first(inputs) + self.label(label))))
        features = [hidden.view(-1, *self.feature_shapes[0])][:num_taps]
        x, sigma, label = x[:num_denoise], sigma[:num_denoise], label[:num_denoise]
        c_out = expand(sigma * self.sigma_data * inverse[:num_denoise], x)
        exact = self.mixture.posterior_mean(x, sigma, label)
        return exact + c_out * self.last(hidden[:num_denoise]).view(x.shape), features


def mixture_teacher(
    mixture: GaussianMixture,
    sample_shape: tuple[int, ...],
    *,
    grid: NoiseGrid | None = None,
    sigma_data: float = 0.5,
    levels: int = 256,
    seed: int = 0,
) -> Teacher:
    """A frozen, exact teacher of any mixture; `seed` initialises the network that its copies train."""
    denoiser = MixtureDenoiser(mixture, sample_shape, sigma_data)
    denoiser.reset(torch.Generator().manual_seed(seed))
    return Teacher(
        denoiser=denoiser.eval().requires_grad_(False),
        grid=grid or NoiseGrid.karras(),
        codec=PixelCodec(levels, sample_shape[0]),
        conditioner=ClassConditioner(mixture.means.shape[0]),
        sample_shape=tuple(sample_shape),
        sigma_data=sigma_data,
    )


def load_mixture(teacher: config.TeacherConfig, data: config.Data, weights: Path | None, *, seed: int = 0) -> Teacher:
    """The teacher of a fixed mixture on samples of the data's shape: two modes per class with constant means."""
    shape = (data.channels, data.resolution, data.resolution)
    places = torch.rand(
        data.classes, len(MODE_WEIGHTS), math.prod(shape), generator=torch.Generator().manual_seed(0), device="cpu"
    )
    weight = torch.tensor(MODE_WEIGHTS, device="cpu").expand(data.classes, -1).clone()
    mixture = GaussianMixture(1.4 * places - 0.7, torch.full_like(weight, MODE_STD), weight)
    grid = NoiseGrid.karras(teacher.num_levels, teacher.sigma_min, teacher.sigma_max, teacher.rho)
    built = mixture_teacher(mixture, shape, grid=grid, sigma_data=teacher.sigma_data, levels=data.levels, seed=seed)
    if weights is not None:
        load_weights(built.denoiser, weights)
    return built
