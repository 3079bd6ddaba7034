"""Argument checks, shared by both implementations.

A wrong argument raises TypeError or ValueError with its name, value, the rule and the remedy. Shapes: B batch, C
channels.
"""

import torch
from torch import Tensor

from ._types import LinearHead

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
KINDS = ("softplus", "hinge")


def floating(name: str, tensor: Tensor) -> None:
    """Require a non-empty tensor of a supported floating dtype."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a torch.Tensor")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {tensor.dtype}; use bfloat16, float16, float32 or float64")
    if tensor.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, which is empty; skip the step for an empty batch")


def batched(name: str, tensor: Tensor) -> None:
    """Require a floating tensor with a leading batch dimension."""
    floating(name, tensor)
    if tensor.ndim < 1:
        raise ValueError(f"{name} has shape (); it needs a leading batch dimension")


def like(name: str, tensor: Tensor | None, reference_name: str, reference: Tensor) -> None:
    """Require the reference's shape and device; dtypes may differ. None passes."""
    if tensor is None:
        return
    floating(name, tensor)
    if tensor.shape != reference.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} but {reference_name} has {tuple(reference.shape)}; "
            "they must be equal"
        )
    on_device_of(name, tensor, reference_name, reference)


def per_sample(name: str, tensor: Tensor, reference_name: str, reference: Tensor) -> None:
    """Require one value per sample of the reference: shape (B,)."""
    floating(name, tensor)
    if tensor.shape != reference.shape[:1]:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; it must be ({reference.shape[0]},), "
            f"one value per sample of {reference_name}"
        )
    on_device_of(name, tensor, reference_name, reference)


def head_at(head: LinearHead | None, x: Tensor | None, reference_name: str, reference: Tensor) -> None:
    """Require head and x together (raw network outputs) or neither (x0 predictions)."""
    if (head is None) != (x is None):
        have, lack = ("x", "head") if head is None else ("head", "x")
        raise ValueError(f"{have} is given without {lack}; give both for raw outputs or neither for x0 predictions")
    like("x", x, reference_name, reference)
    if head is not None:
        per_sample("head.a", head.a, reference_name, reference)
        per_sample("head.k", head.k, reference_name, reference)


def logits(name: str, tensor: Tensor) -> None:
    """Require one logit per sample: (B,) or (B, 1)."""
    batched(name, tensor)
    if tensor.ndim > 2 or tensor.shape[1:].numel() != 1:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be (B,) or (B, 1), one logit per sample")


def gan_kind(kind: str) -> None:
    """Require a known GAN loss."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(map(repr, KINDS))}")


def norm_arguments(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None
) -> None:
    """Require the arguments of group_norm_silu: x (B, C, ...), weight and bias (C,), scale and shift (B, C)."""
    batched("x", x)
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (B, C, ...)")
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups is {num_groups}, which does not divide the {channels} channels of x")
    if (scale is None) != (shift is None):
        have, lack = ("shift", "scale") if scale is None else ("scale", "shift")
        raise ValueError(f"{have} is given without {lack}; give both for the adaptive form or neither")
    _channelwise("weight", weight, (channels,), x)
    _channelwise("bias", bias, (channels,), x)
    if scale is not None and shift is not None:
        _channelwise("scale", scale, (x.shape[0], channels), x)
        _channelwise("shift", shift, (x.shape[0], channels), x)


def summands(x: Tensor, channel_bias: Tensor | None, residual: Tensor | None) -> None:
    """Require channel_bias (C,) or (B, C) and a residual like x; None passes."""
    batched("x", x)
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (B, C, ...)")
    like("residual", residual, "x", x)
    if channel_bias is not None:
        per_sample = channel_bias.ndim == 2
        _channelwise("channel_bias", channel_bias, tuple(x.shape[:2]) if per_sample else (x.shape[1],), x)


def group_size(x: Tensor, num_groups: int) -> None:
    """Require groups that the Triton kernels support: offsets that fit 32 bits, channels that fit one tile."""
    channels, elements = x.shape[1] // num_groups, x[0].numel() // num_groups
    if elements >= 2**31:
        raise ValueError(f"x has {elements} elements in a group; the Triton kernels take fewer than 2^31")
    if channels > 16_384:
        raise ValueError(f"x has {channels} channels in a group; the Triton kernels take 16384; use more groups")


def _channelwise(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    floating(name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {tuple(shape)} for x {tuple(x.shape)}")
    on_device_of(name, tensor, "x", x)


def on_device_of(name: str, tensor: Tensor, reference_name: str, reference: Tensor) -> None:
    """Require two tensors on the same device."""
    if tensor.device != reference.device:
        raise ValueError(
            f"{name} is on {tensor.device} but {reference_name} is on {reference.device}; move one of them"
        )
