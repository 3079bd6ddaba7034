"""EDM's denoiser (Karras et al. 2022): a U-Net with preconditioning, and its teacher.

Shapes: B batch, (C, H, W) one sample.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from dmd2 import config
from dmd2.method.denoiser import Cond, Denoiser, Prediction, Teacher
from dmd2.method.noise import NoiseGrid, expand
from dmd2.teachers.ddpmpp_unet import DDPMPlusPlus
from dmd2.teachers.edm_blocks import UNetBase
from dmd2.teachers.edm_unet import UNet
from dmd2.teachers.pixels import pixel_space
from dmd2.teachers.weights import load_weights
from dmd2_kernels import LinearHead, implementation

Precision = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NETWORKS: dict[str, type[UNet] | type[DDPMPlusPlus]] = {"adm": UNet, "ddpmpp": DDPMPlusPlus}


class EDMDenoiser(Denoiser):
    """x0 from x and sigma by a U-Net with EDM's preconditioning; conditions are `label`, int64 of shape (B,).

    `precision` is the network's compute dtype; weights, embeddings, preconditioning and outputs stay float32. It may be
    changed between calls: DMD2 trains in bf16 and evaluates in fp32. The network runs in channels_last on CUDA, where
    convolutions are faster in it, and in the contiguous layout on CPU.
    """

    def __init__(self, unet: UNetBase, sample_shape: tuple[int, ...], sigma_data: float, precision: Precision = "fp32"):
        super().__init__()
        self.model = unet
        self.sample_shape, self.sigma_data, self.precision = tuple(sample_shape), sigma_data, precision
        self.feature_shapes = unet.feature_shapes

    def denoise_and_tap(
        self, x: Tensor, sigma: Tensor, cond: Cond, num_denoise: int, num_taps: int = 1
    ) -> tuple[Tensor, list[Tensor]]:
        """See `Denoiser`. EDM, eq. 7 and table 1:

        c_skip = sigma_data^2 / (sigma^2 + sigma_data^2),   c_out = sigma sigma_data / sqrt(sigma^2 + sigma_data^2),
        c_in = 1 / sqrt(sigma^2 + sigma_data^2),            c_noise = ln(sigma) / 4,
        x0_hat = c_skip x + c_out F(c_in x; c_noise, label)
        """
        (out, head), features = self._raw(x, sigma, cond, num_denoise, num_taps)
        if num_denoise == 0:
            return out, features
        return expand(head.a, x) * x[:num_denoise].float() + expand(head.k, x) * out.float(), features

    @property
    def predicts_x0(self) -> bool:
        """See `Denoiser`. On CPU the losses get x0, so that a run's bits stay those of the committed results."""
        return implementation(next(self.parameters())) == "reference"

    def predict_and_tap(
        self, x: Tensor, sigma: Tensor, cond: Cond, num_denoise: int, num_taps: int = 1
    ) -> tuple[Prediction, list[Tensor]]:
        """See `Denoiser`: F's output in the network's dtype with its head, where the kernels take it."""
        if self.predicts_x0:
            return super().predict_and_tap(x, sigma, cond, num_denoise, num_taps)
        (out, head), features = self._raw(x, sigma, cond, num_denoise, num_taps)
        return Prediction(out, head), features

    def _raw(
        self, x: Tensor, sigma: Tensor, cond: Cond, num_denoise: int, num_taps: int
    ) -> tuple[tuple[Tensor, LinearHead], list[Tensor]]:
        """F of the first `num_denoise` samples, with c_skip and c_out (num_denoise,) as head, and the features."""
        if x.shape[1:] != self.sample_shape:
            raise ValueError(
                f"x is {tuple(x.shape)}; this denoiser expects (B, {', '.join(map(str, self.sample_shape))})"
            )
        self.check_taps(num_taps)
        x, sigma = x.float(), sigma.float()
        inverse = (sigma.square() + self.sigma_data**2).rsqrt()  # c_in, (B,)
        layout = torch.channels_last if x.is_cuda else torch.preserve_format
        scaled = (expand(inverse, x) * x).to(DTYPES[self.precision], memory_format=layout)
        encoding = self.model.encode(scaled, sigma.log() / 4, cond["label"])
        features = [feature.float() for feature in self.model.levels(encoding)[:num_taps]]
        sigma, inverse = sigma[:num_denoise], inverse[:num_denoise]
        head = LinearHead((self.sigma_data * inverse).square(), self.sigma_data * sigma * inverse)
        out = x[:0].detach() if num_denoise == 0 else self.model.decode(encoding.first(num_denoise))
        return (out, head), features

    def blocks(self) -> list[nn.Module]:
        """See `Denoiser`."""
        return self.model.blocks()


def build_denoiser(teacher: config.TeacherConfig, data: config.Data) -> EDMDenoiser:
    """The configured denoiser with uninitialised weights; supports `torch.device("meta")`."""
    shape = (data.channels, data.resolution, data.resolution)
    unet = NETWORKS[teacher.network.arch](teacher.network, data.resolution, data.channels, data.classes)
    return EDMDenoiser(unet, shape, teacher.sigma_data)


def load_edm(teacher: config.TeacherConfig, data: config.Data, weights: Path | None, *, seed: int = 0) -> Teacher:
    """The teacher with weights from a file (see `load_weights`), or initialised from `seed`."""
    denoiser = build_denoiser(teacher, data)
    if weights is None:
        denoiser.model.reset(torch.Generator().manual_seed(seed))
    else:
        load_weights(denoiser, weights)
    codec, conditioner = pixel_space(data)
    return Teacher(
        denoiser=denoiser.eval().requires_grad_(False),
        grid=NoiseGrid.karras(teacher.num_levels, teacher.sigma_min, teacher.sigma_max, teacher.rho),
        codec=codec,
        conditioner=conditioner,
        sample_shape=denoiser.sample_shape,
        sigma_data=teacher.sigma_data,
    )
