"""Models in diffusers' folder layout: found, checked and loaded offline, from safetensors alone.

A *components folder* has `vae/ text_encoder/ tokenizer/ scheduler/` and, for SDXL's kind, `text_encoder_2/
tokenizer_2/`; a user's model folder has `unet/` too. Nothing in a folder is executed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from dmd2.config import Data, DiffusersTeacherConfig
from dmd2.errors import UserError
from dmd2.files import read_json
from dmd2.teachers.predictions import FLOW

WEIGHTS = {"vae": "diffusion_pytorch_model", "unet": "diffusion_pytorch_model"}  # others: model
PATTERNS = ("*.json", "*.txt", "*.safetensors")


def parts_of(pooled: bool) -> tuple[str, ...]:
    """The subfolders of a components folder; `pooled`: with pooled text (SDXL's kind)."""
    first = ("vae", "text_encoder", "tokenizer", "scheduler")
    return (*first, "text_encoder_2", "tokenizer_2") if pooled else first


def weight_files(folder: Path, part: str, variant: str | None = None) -> list[Path]:
    """The safetensors files of one network of a model folder: one, or several that its index lists.

    Raises UserError if there are none, also if there are pickles instead.
    """
    home, stem = folder / part, WEIGHTS.get(part, "model")
    if not home.is_dir():
        raise UserError(f"{folder}: no component {part}/; the folder must have diffusers' layout")
    single = home / f"{stem}.{variant}.safetensors" if variant else home / f"{stem}.safetensors"
    if single.is_file():
        return [single]
    index = home / (f"{stem}.safetensors.index.{variant}.json" if variant else f"{stem}.safetensors.index.json")
    if index.is_file():
        return [home / name for name in sorted(set(_mapping(read_json(index), "weight_map", index).values()))]
    kept = ", ".join(sorted(path.name for path in home.iterdir() if path.is_file())) or "nothing"
    raise UserError(
        f"{single}: no such file (there is {kept}); only safetensors are read: fetch or save the model with "
        f"safe_serialization, or correct `teacher.weights.variant`"
    )


def _mapping(value: Mapping[str, Any], key: str, path: Path) -> dict[str, str]:
    found = value.get(key)
    if not isinstance(found, dict) or not all(isinstance(v, str) and "/" not in v for v in found.values()):
        raise UserError(f"{path}: no table `{key}` of file names; fetch it again")
    return found


def check_components(folder: Path, teacher: DiffusersTeacherConfig, data: Data, pooled: bool, width: int) -> None:
    """Raises UserError unless the components folder is complete and fits the configuration; reads JSON alone.

    `width` is the text width that the U-Net attends to.
    """
    for part in parts_of(pooled):
        if not (folder / part).is_dir():
            raise UserError(f"{folder}: no component {part}/; it must have {', '.join(parts_of(pooled))}")
    _check_scheduler(folder / "scheduler" / "scheduler_config.json", teacher)
    _check_autoencoder(folder / "vae" / "config.json", teacher, data)
    encoders = [part for part in parts_of(pooled) if part.startswith("text_encoder")]
    widths = [int(read_json(folder / part / "config.json").get("hidden_size", 0)) for part in encoders]
    if sum(widths) != width:
        raise UserError(
            f"{folder}: the text encoders are {' + '.join(map(str, widths))} wide, but teacher.network has "
            f"cross_attention_dim {width}; correct one of them"
        )
    for part in ("vae", *encoders):
        weight_files(folder, part)


def _check_scheduler(path: Path, teacher: DiffusersTeacherConfig) -> None:
    """The noise levels and the kind of prediction of the folder are the configured ones."""
    found = read_json(path)
    kind = FLOW if "FlowMatch" in str(found.get("_class_name")) else found.get("prediction_type", "epsilon")
    if kind != teacher.prediction:
        raise UserError(
            f"{path}: the model predicts {kind}, but teacher.prediction is {teacher.prediction}; set {kind}"
        )
    wanted: dict[str, Any] = {"num_train_timesteps": teacher.num_levels}
    if kind != FLOW:
        wanted |= {"beta_start": teacher.beta_start, "beta_end": teacher.beta_end, "beta_schedule": "scaled_linear"}
        wanted |= {"trained_betas": None, "rescale_betas_zero_snr": False}
    for key, value in wanted.items():
        have = found.get(key, value)
        same = math.isclose(have, value, rel_tol=1e-6) if _numbers(have, value) else have == value
        if not same:
            raise UserError(
                f"{path}: {key} is {have}, but the configured teacher's is {value}; correct the configuration"
            )


def _numbers(*values: Any) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _check_autoencoder(path: Path, teacher: DiffusersTeacherConfig, data: Data) -> None:
    found = read_json(path)
    factor = 1 << (len(found.get("block_out_channels", ())) - 1) if found.get("block_out_channels") else None
    for key, have, value in (
        ("latent channels", found.get("latent_channels"), teacher.latent_channels),
        ("image pixels per latent", factor, teacher.latent_factor),
        ("image channels", found.get("in_channels"), data.channels),
    ):
        if have != value:
            raise UserError(f"{path}: {have} {key}, but {value} are configured; use the teacher's own autoencoder")
    if found.get("latents_mean") is not None or found.get("latents_std") is not None:
        raise UserError(f"{path}: latents_mean and latents_std are not supported; use an autoencoder with one scale")


def load_autoencoder(folder: Path) -> Any:
    """The autoencoder `vae/`: frozen, float32, in evaluation mode. Raises UserError if it is damaged."""
    from diffusers import AutoencoderKL

    return _loaded(AutoencoderKL, folder, "vae", torch_dtype=torch.float32)


def load_text(folder: Path, pooled: bool) -> tuple[list[Any], list[nn.Module]]:
    """The tokenizers and the text encoders: frozen, float32. Raises UserError if one is damaged or too short."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    kinds = [("", CLIPTextModel), ("_2", CLIPTextModelWithProjection)][: 2 if pooled else 1]
    tokenizers, encoders = [], []
    for suffix, kind in kinds:
        home = folder / f"tokenizer{suffix}"
        try:
            tokenizer = CLIPTokenizer.from_pretrained(home, local_files_only=True)
        except Exception as error:  # the tokenizers library raises bare exceptions
            raise UserError(f"{home}: not a readable CLIP tokenizer ({_line(error)}); fetch it again") from None
        encoder = _loaded(kind, folder, f"text_encoder{suffix}", dtype=torch.float32)
        length, vocabulary = encoder.config.max_position_embeddings, encoder.config.vocab_size
        if tokenizer.model_max_length > length or len(tokenizer) > vocabulary:
            raise UserError(
                f"{home}: {tokenizer.model_max_length} tokens of {len(tokenizer)}, but text_encoder{suffix}/ takes "
                f"{length} of {vocabulary}; use the tokenizer that belongs to it"
            )
        tokenizers.append(tokenizer)
        encoders.append(encoder)
    return tokenizers, encoders


def _loaded(kind: Any, folder: Path, part: str, **dtype: torch.dtype) -> Any:
    """A network of diffusers or transformers from its subfolder, with every weight from the file."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    weight_files(folder, part)
    try:
        network, info = kind.from_pretrained(
            folder / part,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below
            **dtype,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder / part}: not a readable {kind.__name__} ({_line(error)}); fetch it again") from None
    wrong = [*info["missing_keys"], *(str(entry) for entry in info["mismatched_keys"])]
    if wrong:
        raise UserError(
            f"{folder / part}: {len(wrong)} weights are missing or of another shape, the first {wrong[0]}; "
            f"fetch it again"
        )
    return network.eval().requires_grad_(False)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
