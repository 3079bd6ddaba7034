"""Gives a loss its gradients: computed beside the value, kept, and scaled by the upstream gradient in backward."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, *pairs: Tensor) -> Tensor:
        inputs, grads = pairs[::2], pairs[1::2]
        ctx.save_for_backward(*grads)
        ctx.dtypes = [t.dtype for t in inputs]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, go: Tensor) -> tuple[Tensor | None, ...]:
        out: list[Tensor | None] = [None]
        for i, (grad, dtype) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, strict=True)):
            out += [(grad * go).to(dtype) if ctx.needs_input_grad[1 + 2 * i] else None, None]
        return tuple(out)


def wanted(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of one of the tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def attach(loss: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    """The loss, whose gradient in each (tensor, gradient) pair's tensor is that pair's gradient times the upstream one.

    Differentiable once. A loss that nobody asks a gradient of comes back as it is.
    """
    if not wanted(*(tensor for tensor, _ in pairs)):
        return loss
    return _Attach.apply(loss, *(t for pair in pairs for t in pair))
