"""What the kernels do to memory: bytes per argument, no lane outside, no race, no dependence on program order.

The same checker must fail kernels with planted defects, else its silence would mean nothing.
"""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError

import dmd2_kernels as dk
from dmd2_kernels.ops import _launch

if not _launch.interpreted():
    pytest.skip("the memory checker watches the interpreter; a GPU has compute-sanitizer", allow_module_level=True)

from meter import Launch, metered

pytestmark = pytest.mark.usefixtures("triton_path")


def launches(found: list[Launch], kernel: str) -> Launch:
    (launch,) = [each for each in found if each.kernel.lstrip("_") == kernel]
    return launch


def run_losses() -> list[Tensor]:
    """Every loss, forward and backward, on ragged sizes with heads and guidance; the tensors that come out."""
    torch.manual_seed(0)
    x0, real, fake, x, uncond = torch.randn(5, 3, 2, 37, 31).to(torch.bfloat16)
    head = dk.LinearHead.edm(torch.tensor([0.1, 1.0, 30.0]), 0.5)
    x0.requires_grad_()
    gen, data, moved = (torch.randn(n, 1, requires_grad=True) for n in (5, 4, 4))
    matching = dk.matching_loss(x0, real, fake, x=x, head=head, real_uncond=uncond, guidance_scale=1.75)
    together, grad = dk.matching_loss_and_grad(x0, real, fake)
    denoising = dk.denoising_loss(x0, real, torch.rand(3), x=x, head=head)
    critic = dk.gan_critic_loss(gen, data, perturbed_data_logits=moved, r1_weight=0.3)
    generator = dk.gan_generator_loss(gen, kind="hinge")
    (matching.loss + denoising.loss + critic.loss + generator.loss).backward()
    leaves = [t.grad for t in (x0, gen, data, moved)]
    return [t.detach() for t in (*matching, *together, grad, *denoising, *critic, *generator, *leaves)]


def run_norm(layout: torch.memory_format, shape: tuple[int, ...] = (2, 18, 9, 7), groups: int = 3) -> list[Tensor]:
    """The norm, forward and backward; the tensors that come out."""
    torch.manual_seed(0)
    x = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
    weight, bias, scale, shift = (torch.randn(size, requires_grad=True) for size in [shape[1:2]] * 2 + [shape[:2]] * 2)
    out = dk.group_norm_silu(x, groups, weight, bias, scale=scale, shift=shift)
    out.square().sum().backward()
    return [out.detach(), *(t.grad for t in (x, weight, bias, scale, shift))]


RUNS = {
    "losses": run_losses,
    "norm nchw": lambda: run_norm(torch.contiguous_format),
    "norm nhwc": lambda: run_norm(torch.channels_last, (2, 18, 19, 17)),
    "norm nchw in tiles": lambda: run_norm(torch.contiguous_format, (1, 12, 64, 64), 1),
}


@pytest.mark.parametrize("name", list(RUNS))
def test_meter_finds_nothing_and_program_order_changes_no_bit(name: str) -> None:
    answers = []
    for order in ("forward", "reversed", "shuffled"):
        with metered(order):
            answers.append(RUNS[name]())
    for other in answers[1:]:
        for mine, true in zip(other, answers[0], strict=True):
            assert torch.equal(mine, true)


def test_meter_matching_loss_touches_each_byte_once() -> None:
    x0, real, fake = torch.randn(3, 2, 3, 64, 64)
    x0.requires_grad_()
    with metered() as meter:
        dk.matching_loss(x0, real, fake).loss.backward()
    forward, backward = launches(meter.launches, "partial_sums"), launches(meter.launches, "slopes")
    assert [forward.reads(n) for n in ("x0", "real", "fake")] == [1, 1, 1]
    assert [backward.reads(n) for n in ("real", "fake")] == [1, 1]
    assert backward.writes("grad") == 1
    assert launches(meter.launches, "finish").reads("partial") == 1
    assert len(meter.launches) == 3


def test_meter_matching_loss_and_grad_is_at_the_floor_of_three_reads_and_one_write() -> None:
    x0, real, fake = torch.randn(3, 2, 4, 64, 64)
    with metered() as meter:
        dk.matching_loss_and_grad(x0, real, fake)
    whole = launches(meter.launches, "whole_sample")
    assert [whole.reads(n) for n in ("x0", "real", "fake")] == [1, 1, 1]
    assert [whole.writes(n) for n in ("grad", "weight", "sq_norm", "num_nonfinite")] == [1, 1, 1, 1]
    assert len(meter.launches) == 2


def test_meter_denoising_loss_touches_each_byte_once() -> None:
    out, target, x = torch.randn(3, 2, 3, 64, 64)
    out.requires_grad_()
    head = dk.LinearHead.edm(torch.tensor([0.1, 10.0]), 0.5)
    with metered() as meter:
        dk.denoising_loss(out, target, torch.ones(2), x=x, head=head).loss.backward()
    forward, backward = launches(meter.launches, "squares"), launches(meter.launches, "slopes")
    for launch in (forward, backward):
        assert [launch.reads(n) for n in ("out", "target", "x")] == [1, 1, 1]
    assert backward.writes("grad") == 1


@pytest.mark.parametrize(
    ("shape", "layout", "forward_reads", "backward_reads"),
    [
        ((1, 12, 32, 32), torch.contiguous_format, {"forward": 1}, {"backward": 1}),
        ((1, 12, 64, 64), torch.contiguous_format, {"forward": 2}, {"backward": 2}),
        ((1, 12, 32, 32), torch.channels_last, {"moments": 1, "apply": 1}, {"slope_sums": 1, "apply_slopes": 1}),
    ],
    ids=["in registers", "in tiles", "channels_last"],
)
def test_meter_group_norm_reads_and_writes_what_the_readme_says(
    shape: tuple[int, ...],
    layout: torch.memory_format,
    forward_reads: dict[str, int],
    backward_reads: dict[str, int],
) -> None:
    with metered() as meter:
        run_norm(layout, shape, groups=1)
    for kernel, times in forward_reads.items():
        assert launches(meter.launches, kernel).reads("x") == times
    for kernel, times in backward_reads.items():
        assert [launches(meter.launches, kernel).reads(n) for n in ("dy", "x")] == [times, times]
    assert launches(meter.launches, list(forward_reads)[-1]).writes("y") == 1
    assert launches(meter.launches, list(backward_reads)[-1]).writes("dx") == 1


@triton.jit
def _reads_past_the_end(x, y, num, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y + offs, tl.load(x + offs).to(tl.float32), mask=offs < num)


@triton.jit
def _forgets_other(x, y, num, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y, tl.sum(tl.load(x + offs, mask=offs < num).to(tl.float32)))


@triton.jit
def _sums_across_programs(x, y, num, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    part = tl.sum(tl.load(x + offs, mask=offs < num, other=0.0).to(tl.float32))
    tl.store(y, tl.load(y).to(tl.float32) + part)


@triton.jit
def _reads_a_neighbour(x, y, num, BLOCK: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    tl.store(y + pid, tl.load(x + pid).to(tl.float32))
    tl.store(x + pid, tl.load(y + (pid + 1) % 4).to(tl.float32))


@triton.jit
def _sums_the_padding_too(x, y, num, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    value = tl.load(x + offs, mask=offs < num, other=0.0).to(tl.float32)
    tl.store(y, tl.sum((value - 1.0) * (value - 1.0)))


def test_meter_catches_a_planted_out_of_bounds_read() -> None:
    with metered(), pytest.raises(InterpreterError, match=r"_reads_past_the_end leaves x in 24 lanes"):
        _launch.launch(_reads_past_the_end, 1, torch.ones(40), torch.zeros(40), 40, BLOCK=64, num_warps=1)


def test_meter_catches_a_planted_missing_mask_value() -> None:
    out = torch.zeros(1)
    with metered():
        _launch.launch(_forgets_other, 1, torch.ones(40), out, 40, BLOCK=64, num_warps=1)
    assert out.isnan().all()


@pytest.mark.parametrize("kernel", [_sums_across_programs, _reads_a_neighbour])
def test_meter_catches_a_planted_race(kernel: object) -> None:
    with metered(), pytest.raises(InterpreterError, match="another program"):
        _launch.launch(kernel, 4, torch.ones(64), torch.zeros(4), 64, BLOCK=16, num_warps=1)


def test_closeness_catches_a_planted_wrong_reduction() -> None:
    out, values = torch.zeros(1), torch.randn(40)
    with metered():
        _launch.launch(_sums_the_padding_too, 1, values, out, 40, BLOCK=64, num_warps=1)
    exact = (values.double() - 1).square().sum()
    assert abs(out.double().item() - exact) > 5e-7 * exact
