"""Trains the small autoencoder of a text-to-image teacher: diffusers' `AutoencoderKL` on a data set's images.

As Rombach et al. 2022 (section 3.1, appendix G), without the perceptual and adversarial terms: squared error plus a
slight Kullback-Leibler penalty. Shapes: B batch, (c, h, w) one latent, (H, W, C) one image.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from dmd2.config import ComponentsTraining
from dmd2.errors import UserError
from dmd2.teachers.fit_components import minimise, refused, seeded

KEY = "teacher.training.components.autoencoder"
FOLDER = "vae"
UNSEEN = 20
"""Every 20th image is left out of training, to measure the reconstruction."""
CHUNK = 250


def fit_autoencoder(
    images: np.ndarray, training: ComponentsTraining, folder: Path, *, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Trains an autoencoder on uint8 images (N, H, W, C) and writes it to `folder`/vae in diffusers' layout.

    Loss: mean squared error of pixels in [-1, 1], plus `kl_weight` times the mean KL divergence per latent value. The
    scaling factor of the configuration makes the latents' standard deviation 1. Everything is a function of images
    and `training` (on one kind of device). Facts: `psnr` (dB) of unseen images' posterior samples decoded and rounded
    to 8 bits, `latent_shape`, `latent_mean`, `latent_std` (before scaling), `scaling_factor`, and those of `minimise`.
    Raises UserError for a configuration that does not fit the images, before training.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) < UNSEEN:
        raise UserError(
            f"an autoencoder is trained on at least {UNSEEN} uint8 images (N, H, W, C), got {images.dtype} "
            f"{images.shape}; check the data set"
        )
    vae = build_autoencoder(training, images.shape[1:]).to(device)
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().to(device) / 127.5 - 1
    is_unseen = torch.arange(len(x)) % UNSEEN == UNSEEN - 1
    seen, unseen = x[~is_unseen], x[is_unseen]

    def loss(rng: torch.Generator) -> Tensor:
        batch = seen[torch.randint(len(seen), (training.autoencoder_batch_size,), generator=rng).to(device)]
        posterior = vae.encode(batch).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=rng).to(device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return (decoded - batch).square().mean() + training.kl_weight * kl

    facts = minimise(
        vae,
        loss,
        iterations=training.autoencoder_iterations,
        learning_rate=training.autoencoder_learning_rate,
        seed=training.seed,
        title="autoencoder",
    )
    latents = _latents(vae, seen, training.seed)
    spread = latents.std().item()
    if not (math.isfinite(spread) and spread > 0):
        raise UserError(f"{KEY}: all latents are equal or not finite after training; lower the rate or `kl_weight`")
    vae.register_to_config(scaling_factor=1 / spread)
    measured = {
        "psnr": _psnr(vae, unseen, training.seed),
        "latent_shape": list(latents.shape[1:]),
        "latent_mean": latents.mean().item(),
        "latent_std": spread,
        "scaling_factor": 1 / spread,
    }
    vae.to("cpu").save_pretrained(folder / FOLDER, safe_serialization=True)
    return {**measured, **facts}


def build_autoencoder(training: ComponentsTraining, image_shape: tuple[int, ...]) -> Any:
    """The configured autoencoder for images (H, W, C), initialised from `training.seed`. Raises UserError."""
    height, width, channels = image_shape
    make: Any = AutoencoderKL  # its own type hides that it is a module
    chosen = {"in_channels": channels, "out_channels": channels, "sample_size": height, **training.autoencoder}
    if (chosen["in_channels"], chosen["out_channels"]) != (channels, channels):
        raise UserError(f"{KEY}: in_channels and out_channels must be {channels}, as the images'; leave them out")
    try:
        vae = seeded(lambda: make(**chosen), training.seed)
    except (TypeError, ValueError, RuntimeError) as error:
        raise refused(KEY, error) from None
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if height % factor or width % factor:
        raise UserError(
            f"{KEY}: images of {height}x{width} cannot be halved {factor.bit_length() - 1} times; use "
            f"fewer block_out_channels"
        )
    return vae


@torch.no_grad()
def _latents(vae: Any, x: Tensor, seed: int) -> Tensor:
    """Samples (B, c, h, w) of the posteriors of x (B, C, H, W), before scaling."""
    rng = torch.Generator().manual_seed(seed)
    parts = []
    for part in x.split(CHUNK):
        posterior = vae.encode(part).latent_dist
        parts.append(posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=rng).to(x.device))
    return torch.cat(parts)


@torch.no_grad()
def _psnr(vae: Any, x: Tensor, seed: int) -> float:
    """PSNR in dB (peak 255) of all of x (B, C, H, W) after encoding, decoding and rounding to 8 bits."""
    decoded = torch.cat([vae.decode(part).sample for part in _latents(vae, x, seed).split(CHUNK)])
    levels = ((decoded.clamp(-1, 1) + 1) * 127.5).round()
    error = (levels - (x + 1) * 127.5).double().square().mean().item()
    return 10 * math.log10(255**2 / max(error, 1e-9))
