"""A denoiser around the U-Net of diffusers (`UNet2DConditionModel`), with taps on its encoder.

Shapes: B batch, (C, H, W) one latent; L text length, D text width, P width of the pooled text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from dmd2.errors import UserError
from dmd2.method.denoiser import Cond, Denoiser, Prediction
from dmd2.method.noise import expand
from dmd2.teachers.diffusers_layers import Recomputed, norm_act, replace_layers
from dmd2.teachers.predictions import boundaries, guidance_embedding, input_scale, linear_head, timestep
from dmd2.teachers.unet_configs import check_config

Precision = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TIME_IDS = 6


class Encoding(NamedTuple):
    """What the encoder hands to the decoder."""

    hidden: Tensor  # (B, C, H, W), output of the middle block
    skips: tuple[Tensor, ...]
    emb: Tensor  # (B, E)
    text: Tensor  # (B, L, D)

    def first(self, num: int) -> Encoding:
        """The encoding of the first `num` samples."""
        if num == len(self.hidden):
            return self
        return Encoding(self.hidden[:num], tuple(skip[:num] for skip in self.skips), self.emb[:num], self.text[:num])


class DiffusersDenoiser(Denoiser):
    """x0 from x and sigma by the U-Net of Stable Diffusion and its relatives, in latent space.

    Conditions are `text` (B, L, D) and, for U-Nets of SDXL's kind, `pooled` (B, P) and `time_ids` (B, 6). It takes the
    U-Net's layers as its own, so that the names of its parameters and of its state dict are the U-Net's.

    `embedded_guidance` is the guidance scale that conditions a U-Net with `time_cond_proj_dim` (LCM).

    `precision` is the compute dtype, whatever the weights' dtype is; preconditioning and outputs are float32 (float64
    for a float64 x). Taps are the output of the middle block, then the last skip of each finer level.
    """

    predicts_x0 = False
    limits: Tensor
    guidance_cond: Tensor | None
    conv_in: nn.Module
    time_proj: nn.Module
    time_embedding: nn.Module
    add_time_proj: nn.Module
    add_embedding: nn.Module
    down_blocks: nn.ModuleList
    mid_block: nn.Module | None
    up_blocks: nn.ModuleList
    conv_norm_out: nn.Module | None
    conv_act: nn.Module
    conv_out: nn.Module

    def __init__(
        self,
        unet: UNet2DConditionModel,
        sigmas: Tensor,
        prediction: str = "epsilon",
        precision: Precision = "fp32",
        *,
        embedded_guidance: float | None = None,
    ):
        super().__init__()
        config = dict(unet.config)
        check_config(config, embedded_guidance)
        replace_layers(unet)
        for name, child in unet.named_children():
            self.add_module(name, child)
        for name in ("mid_block", "conv_norm_out"):
            if name not in self._modules:
                setattr(self, name, None)
        self.config, self.prediction, self.precision = config, prediction, precision
        self.pooled = config["addition_embed_type"] == "text_time"
        size = config["sample_size"]
        self.sample_shape = (config["in_channels"], size, size)
        channels = config["block_out_channels"]
        last = len(channels) - 1
        finer = [(channels[i], size >> i, size >> i) for i in reversed(range(last))]
        self.feature_shapes = ((channels[last], size >> last, size >> last), *finer)
        self.register_buffer("limits", boundaries(sigmas), persistent=False)
        width = config["time_cond_proj_dim"]
        cond = None if embedded_guidance is None else guidance_embedding(embedded_guidance, width).to(sigmas.device)
        self.register_buffer("guidance_cond", cond, persistent=False)

    def store(self, precision: Precision) -> DiffusersDenoiser:
        """Itself, with its weights in another dtype: a frozen network in bf16 takes half the memory.

        Low-rank adapters keep theirs. (`.to(torch.bfloat16)` would also round the table of noise levels.)
        """
        for name, parameter in self.named_parameters():
            if ".lora_" not in name:
                parameter.data = parameter.data.to(DTYPES[precision])
        return self

    def blocks(self) -> list[nn.Module]:
        """See `Denoiser`: the residual and the transformer blocks."""
        return [module for module in self.modules() if isinstance(module, Recomputed)]

    def denoise_and_tap(
        self, x: Tensor, sigma: Tensor, cond: Cond, num_denoise: int, num_taps: int = 1
    ) -> tuple[Tensor, list[Tensor]]:
        """See `Denoiser`; x0 = a x + k F(c_in x; t, cond), with a, k and c_in of the network's kind of prediction."""
        (out, head), features = self.predict_and_tap(x, sigma, cond, num_denoise, num_taps)
        assert head is not None
        out = out.to(head.a.dtype)
        return expand(head.a, out) * x[:num_denoise].to(out.dtype) + expand(head.k, out) * out, features

    def predict_and_tap(
        self, x: Tensor, sigma: Tensor, cond: Cond, num_denoise: int, num_taps: int = 1
    ) -> tuple[Prediction, list[Tensor]]:
        """See `Denoiser`: the network's raw output in its own dtype, with its head."""
        wide = torch.promote_types(x.dtype, torch.float32)
        encoding = self._encode(x, sigma, cond)
        features = self._tapped(encoding, num_taps)
        if num_denoise == 0:
            out = x[:0].detach().to(wide)
        else:
            out = self._decode(encoding.first(num_denoise))
        return Prediction(out, linear_head(self.prediction, sigma[:num_denoise].to(wide))), features

    def _tapped(self, encoding: Encoding, num_taps: int) -> list[Tensor]:
        """The taps, coarsest first: the last skip of a finer level comes just before its downsampled copy."""
        self.check_taps(num_taps)
        per_level = self.config["layers_per_block"] + 1
        ends = [per_level * (level + 1) - 1 for level in reversed(range(len(self.feature_shapes) - 1))]
        return [feature.float() for feature in (encoding.hidden, *(encoding.skips[end] for end in ends))[:num_taps]]

    def output(self, scaled: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """The U-Net's own function: input c_in * x (B, C, H, W) and timesteps (B,) -> raw output (B, C, H, W)."""
        return self._decode(self._encode_scaled(scaled, time, cond)).to(
            torch.promote_types(scaled.dtype, torch.float32)
        )

    def _encode(self, x: Tensor, sigma: Tensor, cond: Cond) -> Encoding:
        """The encoder and the middle block: x (B, C, H, W), sigma (B,)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        x, sigma = x.to(wide), sigma.to(wide)
        scaled = expand(input_scale(self.prediction, sigma), x) * x
        return self._encode_scaled(scaled, timestep(self.prediction, sigma, self.limits), cond)

    def _encode_scaled(self, scaled: Tensor, time: Tensor, cond: Cond) -> Encoding:
        if scaled.shape[1:] != self.sample_shape:
            shape = ", ".join(map(str, self.sample_shape))
            raise ValueError(f"x is {tuple(scaled.shape)}; this denoiser expects (B, {shape})")
        dtype = torch.float64 if scaled.dtype == torch.float64 else DTYPES[self.precision]
        layout = torch.channels_last if scaled.is_cuda else torch.preserve_format
        h = scaled.to(dtype, memory_format=layout)
        text, emb = cond["text"].to(dtype), self._embedding(time, cond, dtype)
        h = self.conv_in(h)
        skips: tuple[Tensor, ...] = (h,)
        for block in self.down_blocks:
            h, more = block(hidden_states=h, temb=emb, **_attended(block, text))
            skips += tuple(more)
        if self.mid_block is not None:
            h = self.mid_block(h, emb, **_attended(self.mid_block, text))
        return Encoding(h, skips, emb, text)

    def _embedding(self, time: Tensor, cond: Cond, dtype: torch.dtype) -> Tensor:
        """The embedding (B, E) of the timestep and, for SDXL's kind, of the pooled text and the time ids."""
        guidance = None if self.guidance_cond is None else self.guidance_cond.to(dtype)
        emb: Tensor = self.time_embedding(self.time_proj(time).to(dtype), guidance)
        if self.pooled:
            ids = self.add_time_proj(cond["time_ids"].flatten()).reshape(len(time), -1)
            emb = emb + self.add_embedding(torch.cat([cond["pooled"].to(dtype), ids.to(dtype)], dim=-1))
        return emb

    def _decode(self, encoding: Encoding) -> Tensor:
        h, skips, emb, text = encoding
        for block in self.up_blocks:
            num = len(cast(nn.ModuleList, block.resnets))
            h = block(hidden_states=h, temb=emb, res_hidden_states_tuple=skips[-num:], **_attended(block, text))
            skips = skips[:-num]
        if self.conv_norm_out is not None:
            h = norm_act(self.conv_norm_out, self.conv_act, h)
        out: Tensor = self.conv_out(h)
        return out


def _attended(block: nn.Module, text: Tensor) -> dict[str, Tensor]:
    return {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}


def build_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """The U-Net of a configuration, initialised by torch's global generator; supports `torch.device("meta")`.

    Raises UserError for a configuration that diffusers refuses.
    """
    try:
        return UNet2DConditionModel(**config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"teacher.network: diffusers refuses it: {error}; correct the configuration") from None


def stock_unet(denoiser: DiffusersDenoiser) -> UNet2DConditionModel:
    """The U-Net of diffusers with the denoiser's own layers, for saving and for stock pipelines; shares memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**{k: v for k, v in denoiser.config.items() if not k.startswith("_")})
    for name, child in denoiser.named_children():
        setattr(unet, name, child)
    return unet
