"""Attaches precomputed gradients to a loss; backward scales them by the upstream gradient."""

from typing import Any

import torch
from torch import Tensor


class _Once(torch.autograd.Function):
    """The scaled gradient; differentiating it again raises."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, go: Tensor, tensor: Tensor) -> Tensor:
        return (grad * go).to(tensor.dtype)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("the losses of dmd2_kernels are differentiable once; use dmd2_kernels.reference's formulas")


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, *pairs: Tensor) -> Tensor:
        ctx.save_for_backward(*pairs)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, go: Tensor) -> tuple[Tensor | None, ...]:
        out: list[Tensor | None] = [None]
        pairs = ctx.saved_tensors
        for i, (tensor, grad) in enumerate(zip(pairs[::2], pairs[1::2], strict=True)):
            scaled = None
            if ctx.needs_input_grad[1 + 2 * i]:
                again = torch.is_grad_enabled()  # that is create_graph=True
                scaled = _Once.apply(grad, go, tensor) if again else (grad * go).to(tensor.dtype)
            out += [scaled, None]
        return tuple(out)


def wanted(*tensors: Tensor | None) -> bool:
    """Whether autograd needs a gradient of one of the tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def attach(loss: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    """The loss with a backward that gives each pair's tensor its gradient times the upstream one.

    A second derivative raises RuntimeError. Returns the loss unchanged if no gradient is needed.
    """
    if not wanted(*(tensor for tensor, _ in pairs)):
        return loss
    return _Attach.apply(loss, *(t for pair in pairs for t in pair))
