"""Latents of an autoencoder of diffusers (`AutoencoderKL`) as the network's space.

Shapes: B batch, (c, h, w) one latent, (H, W, C) one image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from dmd2.config import Data
from dmd2.errors import UserError
from dmd2.teachers.pixels import PixelCodec
from dmd2.training.rng import normal, step_rng

PIXELS_AT_ONCE = 1 << 20
"""Pixels that the autoencoder encodes or decodes in one call: one image of 1024x1024, four of 512x512."""


class AutoencoderCodec:
    """Images as samples of the autoencoder's posterior, times its scaling factor; implements `denoiser.Codec`.

    Stored latents are float16 (B, c, h, w). The posterior's noise is drawn with a generator for each sample, seeded
    with (`posterior_seed`, id). The autoencoder computes in float32. Without one (for planning) it cannot encode.
    """

    def __init__(
        self, vae: AutoencoderKL | None, data: Data, *, min_psnr: float | None = 20.0, posterior_seed: int = 0
    ):
        self.vae, self.min_psnr, self.posterior_seed = vae, min_psnr, posterior_seed
        self._pixels = PixelCodec(data.levels, data.channels)
        self.scale = 1.0 if vae is None else float(vae.config.scaling_factor)
        self.shift = 0.0 if vae is None else float(vae.config.shift_factor or 0.0)

    @property
    def facts(self) -> dict[str, Any]:
        """What the latents depend on, for the manifest of a set of them; the SHA-256 is of the encoder's weights."""
        digest = hashlib.sha256()
        for name, value in sorted(self._network().state_dict().items()):
            if not name.startswith(("decoder.", "post_quant_conv.")):
                digest.update(name.encode() + value.contiguous().cpu().numpy().tobytes())
        scaling = {"scaling_factor": self.scale, "shift_factor": self.shift}
        return {**scaling, "posterior_seed": self.posterior_seed, "encoder_sha256": digest.hexdigest()}

    def to(self, device: torch.device | str) -> AutoencoderCodec:
        """Itself, with its autoencoder on `device`."""
        if self.vae is not None:
            self.vae.to(device)
        return self

    def _network(self) -> AutoencoderKL:
        if self.vae is None:
            raise UserError("this teacher was loaded without its autoencoder; give the folder of its components")
        return self.vae

    def _chunks(self, num: int, pixels: int) -> list[slice]:
        size = max(1, PIXELS_AT_ONCE // pixels)
        return [slice(start, start + size) for start in range(0, num, size)]

    @torch.no_grad()
    def encode(self, images: np.ndarray, ids: Sequence[int] | range) -> np.ndarray:
        """uint8 images (B, H, W, C) -> latents (B, c, h, w): (mean + std * noise - shift) * scaling factor, float16.

        Raises UserError for images of another shape or with values that are no grey level, and for latents that are
        not finite in float16.
        """
        vae = self._network()
        pixels = self._pixels.load(self._pixels.encode(images))
        parts = []
        for part in self._chunks(len(pixels), pixels[0, 0].numel() if len(pixels) else 1):
            posterior = vae.encode(pixels[part].to(vae.device)).latent_dist
            shape = posterior.mean.shape[1:]
            noise = torch.stack([normal(shape, step_rng(self.posterior_seed, int(i))) for i in ids[part]])
            latents = posterior.mean + posterior.std * noise.to(vae.device)
            parts.append(((latents - self.shift) * self.scale).to(torch.float16).cpu())
        stored = torch.cat(parts) if parts else torch.empty(0, dtype=torch.float16)
        if not torch.isfinite(stored).all():
            raise UserError("the autoencoder's latents are not finite in float16; use another autoencoder")
        return stored.numpy()

    def load(self, stored: np.ndarray) -> Tensor:
        """Stored latents (B, c, h, w) -> float32 x0."""
        return torch.tensor(stored, dtype=torch.float32)

    @torch.no_grad()
    def decode(self, x0: Tensor, *, rounding: str = "round") -> np.ndarray:
        """x0 (B, c, h, w) -> uint8 images (B, H, W, C); the autoencoder runs in float32, a few images at a time.

        `rounding` and NaN: see `PixelCodec.decode`.
        """
        vae = self._network()
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        latents = x0.detach().float() / self.scale + self.shift
        images = [
            self._pixels.decode(vae.decode(latents[part].to(vae.device)).sample, rounding=rounding)
            for part in self._chunks(len(x0), factor**2 * x0[0, 0].numel() if len(x0) else 1)
        ]
        return np.concatenate(images) if images else np.empty((0, 0, 0, self._pixels.channels), np.uint8)
