"""Layers of a network of diffusers that compute in their input's dtype, and blocks that can recompute activations.

Both replace the class of existing modules, so that neither parameters nor their names change, and a deep copy, FSDP and
peft see ordinary layers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W')."""
        return self._conv_forward(x, _like(self.weight, x), _like(self.bias, x))


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


class RecomputedResnet(Recomputed, ResnetBlock2D):
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
