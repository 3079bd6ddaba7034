"""Layers of a network of diffusers that compute in their input's dtype, and blocks that can recompute activations.

Both replace the class of existing modules, so that neither parameters nor their names change, and a deep copy, FSDP and
peft see ordinary layers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dmd2_kernels as dk
from dmd2.errors import UserError


def _like(parameter: Tensor | None, x: Tensor) -> Any:
    return None if parameter is None else parameter.to(x.dtype)


class Linear(nn.Linear):
    """`nn.Linear` in the input's dtype, whatever the weights' is."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, _like(self.weight, x), _like(self.bias, x))


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` in the input's dtype, whatever the weights' is."""

    def forward(self, x: Tensor, *, biased: bool = True) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W'); without its bias if the next op adds it."""
        return self._conv_forward(x, _like(self.weight, x), _like(self.bias, x) if biased else None)


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` in the input's dtype, whatever the weights' is."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> (B, C, ...)."""
        return F.group_norm(x, self.num_groups, _like(self.weight, x), _like(self.bias, x), self.eps)


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` in the input's dtype, whatever the weights' is."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return F.layer_norm(x, self.normalized_shape, _like(self.weight, x), _like(self.bias, x), self.eps)


class Recomputed(nn.Module):
    """A block with activation checkpointing, on if `recompute`.

    `at_recompute`, if set, is called when the block runs, and gives the context in which backward runs it again. A
    compiled block does not need it: its backward has the weights of its forward.
    """

    recompute = False
    at_recompute: Callable[[], AbstractContextManager[Any]] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's own forward."""
        if not (self.recompute and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": self.training}
        if self.at_recompute is not None and not torch.compiler.is_compiling():
            contexts = (nullcontext(), self.at_recompute())
            options["context_fn"] = lambda: contexts
        return checkpoint(super().forward, *args, **options, **kwargs)


def fuses(x: Tensor) -> bool:
    """Whether norm and activation are one op; where the reference runs (a CPU), the layers are diffusers' own."""
    return dk.implementation(x) != "reference"


class Added(NamedTuple):
    """What a norm gets beside its input; see `dmd2_kernels.group_norm_silu`."""

    scale: Tensor | None = None
    shift: Tensor | None = None
    channel_bias: Tensor | None = None


def norm_act(norm: nn.Module, act: nn.Module, x: Tensor, added: Added | None = None) -> Tensor:
    """act(norm(x)), in one op where its kernel runs; only there with `added`."""
    if isinstance(norm, nn.GroupNorm) and isinstance(act, nn.SiLU) and fuses(x):
        more = {} if added is None else added._asdict()
        return dk.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, **more)
    assert added is None
    out: Tensor = act(norm(x))
    return out


class FusedResnet(ResnetBlock2D):
    """The residual block of diffusers with GroupNorm and SiLU as one op, biases and additions folded (`dk.folds`)."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """(B, C_in, H, W), (B, E) -> (B, C_out, H', W')."""
        if not fuses(input_tensor) or not isinstance(self.nonlinearity, nn.SiLU):
            whole: Tensor = super().forward(input_tensor, temb, *args, **kwargs)
            return whole
        h = norm_act(self.norm1, self.nonlinearity, input_tensor)
        for change in (self.upsample, self.downsample):
            if change is not None:
                input_tensor, h = change(input_tensor), change(h)
        h, bias = _convolved(self.conv1, h)
        h = norm_act(self.norm2, self.nonlinearity, h, self._from_time(temb, bias))
        h, bias = _convolved(self.conv2, self.dropout(h))
        residual, more = input_tensor, None
        if self.conv_shortcut is not None:
            residual, more = _convolved(self.conv_shortcut, input_tensor)
        bias = _sum(bias, more)
        if bias is None:
            return (residual + h) / self.output_scale_factor
        return dk.residual_sum(h, residual, bias, 1 / self.output_scale_factor)

    def _from_time(self, temb: Tensor | None, bias: Tensor | None) -> Added:
        """What the second norm gets from the embedding (B, E) and from the bias of the convolution before it."""
        if self.time_emb_proj is None or temb is None:
            return Added(channel_bias=bias)
        rows = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if self.time_embedding_norm == "default":
            return Added(channel_bias=_sum(rows, bias))
        scale, shift = rows.chunk(2, dim=1)
        return Added(scale, shift, bias)


def _convolved(conv: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The convolution's output without its bias, and that, if ops are to fold it; an adapted one is left alone."""
    if type(conv) is Conv2d and dk.folds(x):
        return conv(x, biased=False), conv.bias
    return conv(x), None


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two biases, float32 at least."""
    if one is None or other is None:
        return other if one is None else one
    return one.float() + other.float()


class RecomputedResnet(Recomputed, FusedResnet):
    """A residual block of diffusers."""


class RecomputedTransformer(Recomputed, BasicTransformerBlock):
    """A transformer block of diffusers: self-attention, cross-attention and feed-forward layers."""


REPLACED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Linear,
    nn.Conv2d: Conv2d,
    nn.GroupNorm: GroupNorm,
    nn.LayerNorm: LayerNorm,
    ResnetBlock2D: RecomputedResnet,
    BasicTransformerBlock: RecomputedTransformer,
}


def replace_layers(network: nn.Module) -> None:
    """Changes the classes of a network's layers and blocks, in place.

    Raises UserError for a network with another kind of layer that has weights.
    """
    for name, module in network.named_modules():
        if type(module) in REPLACED:
            module.__class__ = REPLACED[type(module)]
        elif type(module) not in REPLACED.values() and next(module.parameters(recurse=False), None) is not None:
            raise UserError(f"teacher.network: layer {name} is a {type(module).__name__}, which is not supported")
