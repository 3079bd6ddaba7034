"""Tiny randomly initialised pipelines shaped like Stable Diffusion v1.5 and SDXL, in diffusers' folder layout.

Images are 16x16, latents (4, 8, 8), the bottleneck is 4x4. The SDXL shape has two tokenizers and text encoders, the
pooled embedding of the second and six time ids. Weights are random, so that every condition changes the output.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dmd2 import config

RESOLUTION = 16
LATENT = (4, 8, 8)
LENGTH = 8
WIDTH = 16
WORDS = ("a", "three", "seven", "left", "right", "of", "photo", "red", "cat", "dog")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
START, END = "<|startoftext|>", "<|endoftext|>"

UNET: dict[str, Any] = {
    "sample_size": LATENT[1],
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
}
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {
        **UNET,
        "cross_attention_dim": WIDTH,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    },
    "sdxl": {
        **UNET,
        "cross_attention_dim": 2 * WIDTH,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": WIDTH + 6 * 4,
    },
}
KINDS = tuple(UNETS)


def tiny_tokenizer(words: tuple[str, ...] = WORDS, length: int = LENGTH, pad: str = END) -> CLIPTokenizer:
    """A byte-pair tokenizer with the lower-case letters, and `words` as one token each."""
    letters = [chr(ord("a") + i) for i in range(26)]
    symbols, merges = dict.fromkeys([*letters, *(f"{letter}</w>" for letter in letters), "!</w>"]), {}
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            left, right, *rest = parts
            merges[left, right] = None
            symbols[left + right] = None
            parts = [left + right, *rest]
    vocabulary = {symbol: index for index, symbol in enumerate([*symbols, START, END])}
    return CLIPTokenizer(vocab=vocabulary, merges=list(merges), pad_token=pad, model_max_length=length)


def _text_config(tokenizer: CLIPTokenizer, length: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_vae(channels: int = 3, scaling_factor: float = 0.18215) -> AutoencoderKL:
    """An autoencoder with latents of half the image's size."""
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=RESOLUTION,
        scaling_factor=scaling_factor,
    )


def tiny_pipeline(kind: str, *, seed: int = 0, channels: int = 3, length: int = LENGTH, **scheduler: Any) -> Any:
    """A stock pipeline of diffusers of kind sd15 or sdxl; `scheduler` are options of its scheduler."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer(length=length)
        parts = {
            "vae": tiny_vae(channels, 0.18215 if kind == "sd15" else 0.13025),
            "text_encoder": CLIPTextModel(_text_config(tokenizer, length)),
            "tokenizer": tokenizer,
            "unet": _random(UNet2DConditionModel(**UNETS[kind])),
        }
        if kind == "sd15":
            parts["scheduler"] = PNDMScheduler(
                **{**BETAS, "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1, **scheduler}
            )
            return StableDiffusionPipeline(
                **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
        second = tiny_tokenizer(length=length, pad="!</w>")
        parts["tokenizer_2"] = second
        parts["text_encoder_2"] = CLIPTextModelWithProjection(_text_config(second, length))
        parts["scheduler"] = EulerDiscreteScheduler(**{**BETAS, "steps_offset": 1, **scheduler})
        return StableDiffusionXLPipeline(**parts, add_watermarker=False)


def _random(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Larger weights than at initialisation, so that text, pooled text and time ids are felt in the output."""
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return unet


def write_pipeline(kind: str, folder: Path, **options: Any) -> Path:
    """The folder of `tiny_pipeline`, as a user would have it, in safetensors."""
    tiny_pipeline(kind, **options).save_pretrained(folder, safe_serialization=True)
    return folder


def tiny_teacher(kind: str, folder: Path | None = None, **keys: Any) -> config.DiffusersTeacherConfig:
    """The configuration of the tiny teacher; with `folder` its weights come from there."""
    weights = None if folder is None else config.ModelFolder(path=str(folder))
    given = {"network": UNETS[kind], "null": "empty" if kind == "sd15" else "zeros", "weights": weights}
    return config.DiffusersTeacherConfig(kind="diffusers", latent_factor=2, **{**given, **keys})


def tiny_data(channels: int = 3) -> config.Data:
    """A data set with captions of the tiny images."""
    return config.Data(source="folder", resolution=RESOLUTION, channels=channels, captions=config.Captions())
