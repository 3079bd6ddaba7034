# mypy: allow-untyped-defs
"""The losses as `torch.ops.dmd2.*`, so that torch.compile and opcheck see one node for each.

Importing this registers the ops without importing triton; an op's first call imports it. The ops return gradients and
have no autograd of their own: the public functions attach the gradients. Layouts are arranged here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import _chunks
from ._dispatch import kernels_for
from .reference import accumulation_dtype


def _flat(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _is_nhwc(t: Tensor) -> bool:
    """Whether a tensor is dense in channels_last and in no other layout."""
    return t.ndim == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)


def arranged(raw: list[Tensor | None], images: list[Tensor | None]) -> tuple[list[Tensor | None], int]:
    """Raw outputs and images, dense, and C if only the former are in channels_last, else 1.

    The first of each list, which is not None, decides about the others; what has the layout already is not copied.
    """
    first, image = raw[0], images[0]
    assert first is not None
    assert image is not None
    if not _is_nhwc(first):
        return _flat(*raw, *images), 1
    last = torch.channels_last
    outputs = [None if t is None else t.contiguous(memory_format=last) for t in raw]
    if _is_nhwc(image):
        return [*outputs, *(None if t is None else t.contiguous(memory_format=last) for t in images)], 1
    return [*outputs, *_flat(*images)], first.shape[1]


def _matching(
    x0: Tensor,
    real: Tensor,
    fake: Tensor,
    x: Tensor | None,
    a: Tensor | None,
    k: Tensor | None,
    uncond: Tensor | None,
    factor: Tensor | None,
    guidance: float,
    scale: float,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(terms, weight, squares, nonfinite, gradient wrt. x0)."""
    ops = kernels_for(x0, "matching_loss_and_grad").score_difference
    (real_, fake_, uncond_, x0_, x_), channels = arranged([real, fake, uncond], [x0, x])
    rest = (uncond_, *_flat(factor), guidance, scale, channels, grad_dtype)
    return ops.loss_and_grad(x0_, real_, fake_, x_, *_flat(a, k), *rest)


matching_loss_and_grad = torch.library.custom_op("dmd2::matching_loss_and_grad", _matching, mutates_args=())


@matching_loss_and_grad.register_fake
def _(x0, real, fake, x, a, k, uncond, factor, guidance, scale, grad_dtype):
    dtype = accumulation_dtype(x0, real, fake, x, uncond, factor)
    (dense, _), _ = arranged([real], [x0])
    squares = x0.new_empty(x0.shape[0], _chunks.matching_chunks(x0[0].numel(), dtype), dtype=dtype)
    terms, weight = squares.new_empty(squares.numel()), squares.new_empty(x0.shape[0])
    return terms, weight, squares, squares.new_empty(squares.shape, dtype=torch.int64), _like(dense, grad_dtype)


def _like(t: Tensor | None, dtype: torch.dtype) -> Tensor:
    assert t is not None
    return torch.empty_like(t, dtype=dtype)


def _denoising(
    out: Tensor,
    target: Tensor,
    weight: Tensor,
    x: Tensor | None,
    a: Tensor | None,
    k: Tensor | None,
    scale: float,
    grad_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """(terms, gradient wrt. out, which is empty without a dtype)."""
    ops = kernels_for(out, "denoising_loss_and_grad").denoising_loss
    (out_, target_, x_), channels = arranged([out], [target, x])
    terms, grad = ops.loss_and_grad(out_, target_, *_flat(weight), x_, *_flat(a, k), scale, channels, grad_dtype)
    return terms, out.new_empty(0) if grad is None else grad


denoising_loss_and_grad = torch.library.custom_op("dmd2::denoising_loss_and_grad", _denoising, mutates_args=())


@denoising_loss_and_grad.register_fake
def _(out, target, weight, x, a, k, scale, grad_dtype):
    terms = out.new_empty(_chunks.denoising_terms(out), dtype=accumulation_dtype(out, target, weight, x))
    (dense, _), _ = arranged([out], [target])
    return terms, out.new_empty(0) if grad_dtype is None else _like(dense, grad_dtype)


def _critic(
    gen: Tensor,
    data: Tensor,
    perturbed: Tensor | None,
    kind: str,
    r1_weight: float,
    scale: float,
    probabilities: bool,
    grad_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(terms, correct, r1, p_data, p_gen, gradients wrt. gen, data and perturbed); what was not requested is empty."""
    ops = kernels_for(gen, "gan_critic_loss_and_grad").gan_loss
    rest = (kind, r1_weight, scale, probabilities, grad_dtype)
    return ops.critic_loss_and_grad(*_flat(gen, data, perturbed), *rest)


gan_critic_loss_and_grad = torch.library.custom_op("dmd2::gan_critic_loss_and_grad", _critic, mutates_args=())


@gan_critic_loss_and_grad.register_fake
def _(gen, data, perturbed, kind, r1_weight, scale, probabilities, grad_dtype):
    dtype = accumulation_dtype(gen, data, perturbed)
    parts = [gen.new_empty(_chunks.gan_terms(gen, data), dtype=dtype) for _ in range(3)]
    shares = [t.new_empty(t.shape if probabilities else 0, dtype=dtype) for t in (data, gen)]
    grads = [gen.new_empty(0) if t is None else _like(t, grad_dtype or t.dtype) for t in (gen, data, perturbed)]
    return *parts, *shares, *grads


def _generator(
    gen: Tensor, kind: str, scale: float, probabilities: bool, grad_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(terms, p_gen, which is empty if it was not requested, gradient wrt. gen)."""
    ops = kernels_for(gen, "gan_generator_loss_and_grad").gan_loss
    return ops.generator_loss_and_grad(*_flat(gen), kind, scale, probabilities, grad_dtype)


gan_generator_loss_and_grad = torch.library.custom_op("dmd2::gan_generator_loss_and_grad", _generator, mutates_args=())


@gan_generator_loss_and_grad.register_fake
def _(gen, kind, scale, probabilities, grad_dtype):
    dtype = accumulation_dtype(gen)
    terms = gen.new_empty(_chunks.gan_terms(gen), dtype=dtype)
    return terms, gen.new_empty(gen.shape if probabilities else 0, dtype=dtype), _like(gen, grad_dtype or gen.dtype)


_DIRECT: dict[Any, Callable[..., Any]] = {
    matching_loss_and_grad: _matching,
    denoising_loss_and_grad: _denoising,
    gan_critic_loss_and_grad: _critic,
    gan_generator_loss_and_grad: _generator,
}


def call(op: Any, *inputs: Any) -> Any:
    """The op's outputs, without gradient, with the least overhead that the tensors allow."""
    x = inputs[0]
    if torch.compiler.is_compiling() or x.is_meta or type(x) not in (Tensor, nn.Parameter):
        return op(*inputs)  # traced and fake tensors need the op
    return _DIRECT[op](*inputs)
