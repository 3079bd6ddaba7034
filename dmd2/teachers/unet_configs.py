"""Public U-Net configurations, so that a model's size is known without its files, and what a configuration may hold."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from dmd2.errors import UserError, suggestion

PUBLIC: dict[str, dict[str, Any]] = {
    "sd15": {
        "sample_size": 64,
        "block_out_channels": [320, 640, 1280, 1280],
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""Stable Diffusion v1.5 (859,520,964 parameters) and SDXL (2,567,463,684), as far as diffusers' defaults differ."""

REQUIRED: dict[str, tuple[Any, ...]] = {
    "addition_embed_type": (None, "text_time"),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim_type": (None,),
    "encoder_hid_dim": (None,),
    "center_input_sample": (False,),
    "time_embedding_act_fn": (None,),
    "attention_type": ("default",),
}


def unet_config(network: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `UNet2DConditionModel` of `teacher.network`: `{like: NAME, ...}` or diffusers' own keys.

    Keys beside `like` replace those of the public configuration. Raises UserError for an unknown name or key.
    """
    from diffusers import UNet2DConditionModel

    own = {key: value for key, value in network.items() if key != "like" and not key.startswith("_")}
    known = [name for name in inspect.signature(UNet2DConditionModel.__init__).parameters if name != "self"]
    if unknown := [key for key in own if key not in known]:
        raise UserError(
            f"teacher.network: no key {unknown[0]!r} in a U-Net of diffusers; {suggestion(unknown[0], known)}"
        )
    if "like" not in network:
        return own
    if network["like"] not in PUBLIC:
        raise UserError(
            f"teacher.network.like: no U-Net {network['like']!r}; {suggestion(str(network['like']), PUBLIC)}"
        )
    return {**PUBLIC[network["like"]], **own}


def check_config(config: Mapping[str, Any], embedded_guidance: float | None = None) -> None:
    """Raises UserError for a full configuration of a U-Net that the denoiser does not support.

    `embedded_guidance` is what a U-Net with `time_cond_proj_dim` needs, and no other takes.
    """
    if (width := config.get("time_cond_proj_dim")) is None and embedded_guidance is not None:
        raise UserError("own.embedded_guidance: the network has no time_cond_proj_dim and takes none; remove it")
    if width is not None and (embedded_guidance is None or width < 4):
        raise UserError(
            f"network.time_cond_proj_dim: {width!r} is only supported of an imported run, at least 4, with the "
            f"guidance scale of its condition in `own.embedded_guidance`"
        )
    for key, allowed in REQUIRED.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(
                f"teacher.network.{key}: {config[key]!r} is not supported; it must be one of {list(allowed)}"
            )
    size, levels = config["sample_size"], len(config["block_out_channels"])
    if not isinstance(size, int) or size % (1 << (levels - 1)):
        raise UserError(
            f"teacher.network.sample_size: {size!r} must be a number divisible by {1 << (levels - 1)}, as there "
            f"are {levels} levels"
        )
    if not isinstance(config["layers_per_block"], int):
        raise UserError(f"teacher.network.layers_per_block: {config['layers_per_block']!r} must be one number")
    if config["in_channels"] != config["out_channels"]:
        raise UserError(
            f"teacher.network: in_channels {config['in_channels']} and out_channels {config['out_channels']} must be "
            f"equal"
        )


def same_config(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Raises UserError if a model's U-Net configuration differs from the configured one in more than `sample_size`."""
    from diffusers import UNet2DConditionModel

    parameters = inspect.signature(UNet2DConditionModel.__init__).parameters
    defaults = {name: value.default for name, value in parameters.items() if name not in ("self", "sample_size")}
    for key, default in defaults.items():
        have, want = found.get(key, default), wanted.get(key, default)
        if not _same(have, want):
            raise UserError(f"{where}: {key} is {have}, but teacher.network has {want}; correct `teacher.network`")


def _same(one: Any, other: Any) -> bool:
    """Whether two values mean the same to diffusers: null is false, and one number stands for that of every level."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, list | tuple):
        return all(_same(part, other) for part in one)
    if isinstance(other, list | tuple):
        return all(_same(one, part) for part in other)
    return (one or False) == (other or False) if {one, other} & {None, False} else one == other
