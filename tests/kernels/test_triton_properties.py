"""Properties that hold for any input: scales, permutations, batches, blocks and upstream gradients."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dmd2_kernels as dk
from dmd2_kernels import _chunks

pytestmark = pytest.mark.usefixtures("triton_path")
few = settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
sizes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))
seeds = st.integers(0, 2**16)


def drawn(seed: int, shape: tuple[int, ...], device: str, num: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device) for _ in range(num)]


@few
@given(seed=seeds, shape=sizes, exponent=st.integers(-20, 20))
def test_the_gradient_does_not_see_a_common_scale(
    seed: int, shape: tuple[int, ...], exponent: int, device: str
) -> None:
    tensors = drawn(seed, shape, device)
    scaled = [t * 2.0**exponent for t in tensors]
    out, grad = dk.matching_loss_and_grad(*tensors)
    out_scaled, grad_scaled = dk.matching_loss_and_grad(*scaled)
    assert torch.equal(grad, grad_scaled)
    assert torch.equal(out.loss, out_scaled.loss)
    assert torch.equal(out.weight * 2.0**exponent, out_scaled.weight)


@few
@given(seed=seeds, shape=sizes)
def test_permuting_samples_permutes_the_answers_bit_for_bit(seed: int, shape: tuple[int, ...], device: str) -> None:
    tensors = drawn(seed, shape, device)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed)).to(device)
    out, grad = dk.matching_loss_and_grad(*tensors)
    moved, moved_grad = dk.matching_loss_and_grad(*(t[order] for t in tensors))
    assert torch.equal(moved_grad, grad[order])
    for name in ("weight", "sq_norm", "num_nonfinite"):
        assert torch.equal(getattr(moved, name), getattr(out, name)[order])


@few
@given(seed=seeds, shape=sizes)
def test_a_sample_does_not_see_its_batch(seed: int, shape: tuple[int, ...], device: str) -> None:
    tensors = drawn(seed, shape, device)
    norm = dk.GroupNormSiLU(shape[1], 1).to(device)
    together = dk.matching_loss(*tensors)
    alone = dk.matching_loss(*(t[:1] for t in tensors))
    assert torch.equal(together.weight[:1], alone.weight)
    assert torch.equal(together.sq_norm[:1], alone.sq_norm)
    assert torch.equal(norm(tensors[0])[:1], norm(tensors[0][:1]))


@few
@given(seed=seeds, launch=st.sampled_from([(512, 4), (1024, 4), (2048, 4)]))
def test_the_block_size_moves_the_loss_by_less_than_1e_6(seed: int, launch: tuple[int, int], device: str) -> None:
    tensors, table = drawn(seed, (2, 3, 80, 79), device), _chunks.chunk
    expected = dk.matching_loss(*tensors)
    _chunks.chunk = lambda num: launch
    try:
        out = dk.matching_loss(*tensors)
    finally:
        _chunks.chunk = table
    for mine, true in zip(out[:3], expected[:3], strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-6, atol=0)


@few
@given(seed=seeds, shape=sizes, power=st.integers(-8, 8))
def test_the_upstream_gradient_scales_the_gradient(seed: int, shape: tuple[int, ...], power: int, device: str) -> None:
    x0, real, fake = drawn(seed, shape, device)
    x0.requires_grad_()
    (plain,) = torch.autograd.grad(dk.matching_loss(x0, real, fake).loss, x0)
    (scaled,) = torch.autograd.grad(dk.matching_loss(x0, real, fake).loss * 2.0**power, x0)
    torch.testing.assert_close(scaled, plain * 2.0**power, rtol=2e-7, atol=0)


@few
@given(seed=seeds, num=st.integers(1, 300))
def test_gan_probabilities_and_losses_are_those_of_single_logits(seed: int, num: int, device: str) -> None:
    gen, data = drawn(seed, (num, 1), device, 2)
    out = dk.gan_critic_loss(gen, data)
    torch.testing.assert_close(out.p_gen, gen[:, 0].sigmoid(), rtol=1e-6, atol=0)
    torch.testing.assert_close(out.p_data, data[:, 0].sigmoid(), rtol=1e-6, atol=0)
    exact = torch.nn.functional.softplus(gen.double()).mean() + torch.nn.functional.softplus(-data.double()).mean()
    torch.testing.assert_close(out.loss.double(), exact, rtol=1e-6, atol=0)


def test_every_op_repeats_its_bits(device: str) -> None:
    tensors = drawn(0, (3, 4, 16, 16), device)
    first = dk.matching_loss_and_grad(*tensors)
    for _ in range(3):
        again = dk.matching_loss_and_grad(*tensors)
        assert all(torch.equal(a, b) for a, b in zip((*first[0], first[1]), (*again[0], again[1]), strict=True))
