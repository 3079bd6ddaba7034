"""The Triton kernels against the definition in float64, on the same rounded inputs, for every stored dtype."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from closeness import assert_layout_and_dtype_do_not_matter, assert_relative, assert_rounded_once
from torch import Tensor

import dmd2_kernels as dk
from dmd2_kernels import reference

pytestmark = pytest.mark.usefixtures("triton_path")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 3, 7, 5), (2, 4, 9, 7), (3, 3, 64, 64), (2, 4, 64, 64)]


def tail_tolerance(device: str) -> float:
    """e^-90 in float32: a GPU's ex2 takes 90 * log2(e), rounded, which the interpreter doesn't model."""
    return 1e-6 if device == "cpu" else 2e-5


def exactly(op: Callable[..., tuple[Tensor, ...]], *tensors: Tensor | None, **rest: object) -> tuple[Tensor, ...]:
    """The op's answer by its definition, in float64."""
    with dk.use("reference"):
        return op(*(None if t is None else t.double() for t in tensors), **rest)


def matching_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str, offset: float = 0) -> list[Tensor]:
    torch.manual_seed(0)
    x0, real, fake, x, uncond = torch.randn(5, *shape) + offset
    return [t.to(dtype).to(device) for t in (x0, real, fake, x, uncond)]


def epsilon_head(num: int, device: str) -> dk.LinearHead:
    """The head of the last timesteps, where sigma / alpha is about 14."""
    return dk.LinearHead.epsilon(0.07, torch.linspace(0.99, 0.9975, num, device=device))


def test_fp64_matching_loss_of_x0_predictions(device: str) -> None:
    for dtype in DTYPES:
        for shape in SHAPES:
            x0, real, fake, *_ = matching_inputs(shape, dtype, device)
            exact, exact_grad = exactly(dk.matching_loss_and_grad, x0, real, fake)
            together, grad = dk.matching_loss_and_grad(x0, real, fake)
            x0.requires_grad_()
            separate = dk.matching_loss(x0, real, fake)
            (3 * separate.loss).backward()
            for got in (together, separate):
                assert_relative(got.loss.detach(), exact.loss)
                assert_relative(got.weight, exact.weight)
                assert_relative(got.sq_norm, exact.sq_norm)
                assert got.num_nonfinite.tolist() == [0] * shape[0]
            assert grad.dtype == dtype
            assert x0.grad is not None
            assert_rounded_once(grad, exact_grad)
            assert_rounded_once(x0.grad, 3 * exact_grad)


def test_fp64_matching_loss_of_raw_outputs_where_alpha_is_small(device: str) -> None:
    for dtype in DTYPES:
        for shape in SHAPES:
            x0, real, fake, x, uncond = matching_inputs(shape, dtype, device)
            head = epsilon_head(shape[0], device)
            free = {"guidance_scale": 8.0}
            factor = torch.linspace(0.1, 1.9, shape[0], device=device)
            exact, exact_grad = reference.matching(
                *(t.double() for t in (x0, real, fake, x)),
                dk.LinearHead(*(t.double() for t in head)),
                uncond.double(),
                8.0,
                factor.double(),
            )
            free |= {"sample_weight": factor, "scale": 0.25}
            out, grad = dk.matching_loss_and_grad(x0, real, fake, x=x, head=head, real_uncond=uncond, **free)
            assert_relative(out.loss, exact.loss)
            assert_relative(out.weight, exact.weight)
            assert_relative(out.sq_norm, exact.sq_norm)
            assert_rounded_once(grad, 0.25 * exact_grad, noise=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 8, 5), (2, 4, 80, 64)], ids=["in registers", "in chunks"])
def test_outputs_in_channels_last_are_read_where_they_lie(shape: tuple[int, ...], device: str) -> None:
    """As a network in bfloat16 leaves them beside images in float32; gradients come back in that layout."""
    x0, real, fake, x, uncond = matching_inputs(shape, torch.float32, device)
    raw = [t.to(torch.bfloat16) for t in (real, fake, uncond)]
    nhwc = [t.contiguous(memory_format=torch.channels_last) for t in raw]
    head, weight = epsilon_head(shape[0], device), torch.linspace(0.5, 2, shape[0], device=device)
    for layout, (mine, other, free) in (("plain", raw), ("nhwc", nhwc)):
        out, grad = dk.matching_loss_and_grad(x0, mine, other, x=x, head=head, real_uncond=free, guidance_scale=3.0)
        sums, slope = dk.denoising_loss_and_grad(mine, x0, weight, x=x, head=head)
        if layout == "plain":
            expected = (out.loss, out.weight, grad, sums.loss, slope)
            continue
        assert grad.stride() == slope.stride() == mine.stride()
        assert (grad.dtype, slope.dtype) == (torch.float32, torch.bfloat16)
        for found, true in zip((out.loss, out.weight, grad, sums.loss, slope), expected, strict=True):
            torch.testing.assert_close(found, true, rtol=2e-6, atol=1e-12)


def test_fp64_matching_loss_of_a_sample_of_65536(device: str) -> None:
    x0, real, fake, *_ = matching_inputs((2, 4, 128, 128), torch.bfloat16, device, offset=30)
    exact, exact_grad = exactly(dk.matching_loss_and_grad, x0, real, fake)
    out, grad = dk.matching_loss_and_grad(x0, real, fake)
    assert_relative(out.loss, exact.loss)
    assert_relative(out.weight, exact.weight)
    assert_rounded_once(grad, exact_grad)


def test_fp64_denoising_loss(device: str) -> None:
    for dtype in DTYPES:
        for shape in SHAPES:
            out, target, x, *_ = matching_inputs(shape, dtype, device)
            sigma = torch.linspace(0.02, 80, shape[0], device=device)
            head = dk.LinearHead.edm(sigma, 0.5)
            weight = sigma**-2 + 4
            for at in ({}, {"x": x, "head": head}):
                wide = (
                    {"x": x.double(), "head": dk.LinearHead(*(t.double() for t in head))}
                    if at
                    else {"x": None, "head": None}
                )
                loss, each, grad = reference.denoising(
                    out.double(), target.double(), weight.double(), need_grad=True, **wide
                )
                raw = out.clone().requires_grad_()
                got = dk.denoising_loss(raw, target, weight, **at)
                got.loss.backward()
                assert_relative(got.loss.detach(), loss)
                assert_relative(got.per_sample, each)
                assert raw.grad is not None
                assert grad is not None
                assert_rounded_once(raw.grad, grad, noise=1e-6)


@pytest.mark.parametrize("kind", ["softplus", "hinge"])
def test_fp64_gan_losses_in_both_tails(kind: str, device: str) -> None:
    values = torch.tensor([[-90.0], [-20], [-1], [-1e-3], [0.0], [0.3], [1], [7], [90]])
    for dtype in DTYPES:
        gen, data, moved = (v.to(dtype).to(device) for v in (values, values[:5] + 0.25, values[:5] + 0.5))
        inputs = [t.clone().requires_grad_() for t in (gen, data, moved)]
        doubles = [t.double().requires_grad_() for t in (gen, data, moved)]
        got = dk.gan_critic_loss(*inputs[:2], kind=kind, perturbed_data_logits=inputs[2], r1_weight=0.25)
        with dk.use("reference"):
            exact = dk.gan_critic_loss(*doubles[:2], kind=kind, perturbed_data_logits=doubles[2], r1_weight=0.25)
        got.loss.backward()
        exact.loss.backward()
        for mine, true in zip(got, exact, strict=True):
            assert_relative(mine.detach(), true.detach(), tail_tolerance(device))
        for mine, true in zip(inputs, doubles, strict=True):
            assert_rounded_once(mine.grad, true.grad)


def test_fp64_each_confident_generator_loss_to_full_relative_accuracy(device: str) -> None:
    for value in (-90.0, -15.0, -1.0, 0.0, 1.0, 9.0, 9.5, 15.0, 90.0):
        logit = torch.tensor([value], device=device)
        exact = np.logaddexp(0.0, -value)
        loss = dk.gan_generator_loss(logit).loss
        assert_relative(loss, torch.tensor(exact, dtype=torch.float64, device=device), tail_tolerance(device))


def test_special_values_equal_those_of_the_reference(device: str) -> None:
    nan, inf = float("nan"), float("inf")
    x0 = torch.ones(7, 1, 3, 5, device=device)
    real, fake = torch.zeros_like(x0), torch.full_like(x0, 2.0)
    real[0] = 1  # w = 0 and d != 0
    real[1], fake[1] = 1, 1  # w = 0 and d = 0
    fake[2, ..., 0] = nan
    fake[3, ..., 0] = -inf
    real[4, ..., 0] = nan
    x0[5, ..., 0] = inf
    x0[6, ..., 0], fake[6, ..., 1] = inf, inf
    with dk.use("reference"):
        expected, expected_grad = dk.matching_loss_and_grad(x0, real, fake)
    together, grad = dk.matching_loss_and_grad(x0, real, fake)
    x0.requires_grad_()
    separate = dk.matching_loss(x0, real, fake)
    separate.loss.backward()
    for got, got_grad in ((together, grad), (separate, x0.grad)):
        for name in separate._fields:
            mine, true = getattr(got, name).detach(), getattr(expected, name)
            torch.testing.assert_close(mine, true, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(got_grad, expected_grad)


def test_non_contiguous_and_mixed_dtypes_give_the_answer_of_contiguous_float32(device: str) -> None:
    assert_layout_and_dtype_do_not_matter(device)


def test_nan_logits_are_not_hidden(device: str) -> None:
    logits = torch.tensor([1.0, float("nan")], device=device)
    for kind in ("softplus", "hinge"):
        assert dk.gan_critic_loss(logits, logits, kind=kind).loss.isnan()
        assert dk.gan_generator_loss(logits, kind=kind).loss.isnan()


def test_bf16_rounding_of_a_store_equals_torch_on_4096_values(device: str) -> None:
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4096,)).to(torch.int32)
    values = bits.view(torch.float32)
    values[:6] = torch.tensor([1e-40, -3e-39, float("inf"), float("-inf"), 3.4e38, 1 + 2.0**-9])
    values = torch.where(values.isnan(), 1.0, values)
    raw = values[None].to(device)
    # With target = 0 and a weight of N / 2, what is stored is `raw` itself, rounded once.
    weight, stored = torch.full((1,), 2048.0, device=device), torch.bfloat16
    op = torch.ops.dmd2.denoising_loss_and_grad
    _, out = op(raw, torch.zeros_like(raw), weight, None, None, None, 1.0, stored)
    finite = values.isfinite()
    torch.testing.assert_close(out[0].cpu()[finite], values.to(torch.bfloat16)[finite], rtol=0, atol=0)
