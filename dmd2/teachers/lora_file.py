"""Low-rank adapters from outside, in the formats that diffusers reads, merged into a network's weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dmd2.errors import UserError
from dmd2.teachers.diffusers_unet import DiffusersDenoiser, stock_unet
from dmd2.teachers.weights import read_weights

DOWN = (".lora_A.weight", ".lora_down.weight", ".lora.down.weight")
"""Ends of the names of first factors: peft's and diffusers', kohya's, and older ones."""


def merge_file(denoiser: DiffusersDenoiser, path: Path | str, *, rank: int | None = None) -> dict[str, Tensor]:
    """The state dict of the U-Net with the adapters of a file added to its weights, float32.

    Reads diffusers' files (`pytorch_lora_weights.safetensors`) and kohya's (`lora_unet_*.lora_down.weight`, `.alpha`),
    of which the released DMD2 adapters are one. Nothing in the file is executed. Raises UserError if it cannot be read,
    has adapters of text encoders or of another rank than `rank`, or is of another base network.
    """
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    kind = StableDiffusionXLPipeline if denoiser.pooled else StableDiffusionPipeline
    state, metadata = read_weights(path), _metadata(Path(path))
    foreign = [name for name in state if name.startswith(("text_encoder", "lora_te"))]
    if foreign:
        raise UserError(f"{path}: adapters of text encoders, such as {foreign[0]}, are not supported; use the U-Net's")
    downs = {name: value for name, value in state.items() if name.endswith(DOWN)}
    num = len(downs)
    if other := [name for name, value in downs.items() if rank not in (None, value.shape[0])]:
        raise UserError(
            f"{path}: the adapter {other[0]} has rank {downs[other[0]].shape[0]}, but {rank} is configured; correct "
            f"`weights.lora_rank` or the file"
        )
    unet = stock_unet(copy.deepcopy(denoiser))
    try:
        found, alphas = kind.lora_state_dict(dict(state), unet_config=unet.config)
        kind.load_lora_into_unet(found, network_alphas=alphas, unet=unet, metadata=metadata)
    except (ValueError, RuntimeError, KeyError, IndexError, TypeError) as error:
        first = str(error).strip().splitlines()[:2]
        raise UserError(
            f"{path}: not adapters of the configured U-Net ({' '.join(first)[:200]}); use its own"
        ) from None
    used = _num_adapted(unet)
    if num == 0 or used != num:
        raise UserError(f"{path}: {used} of its {num} adapters fit the configured U-Net; use a file of the same base")
    unet.fuse_lora()
    unet.unload_lora()
    return {name: value.float() for name, value in unet.state_dict().items()}


def _metadata(path: Path) -> dict[str, Any] | None:
    """The rank and alpha that diffusers saved with the adapters, if it did."""
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("lora_adapter_metadata")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); fetch it again") from None
    return None if text is None else json.loads(text)


def _num_adapted(unet: Any) -> int:
    from peft.tuners.lora import LoraLayer

    return sum(isinstance(module, LoraLayer) for module in unet.modules())
