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
    """Every loss and its gradient, on ragged sizes with heads and guidance; the tensors that come out."""
    torch.manual_seed(0)
    real, fake, uncond = torch.randn(3, 3, 2, 37, 31).to(torch.bfloat16)
    x0, x = torch.randn(2, 3, 2, 37, 31)
    nhwc = [t.contiguous(memory_format=torch.channels_last) for t in (real, fake, uncond)]
    head = dk.LinearHead.edm(torch.tensor([0.1, 1.0, 30.0]), 0.5)
    leaf = x0.clone().requires_grad_()
    gen, data, moved = (torch.randn(n, 1, requires_grad=True) for n in (5, 4, 4))
    guided = {"x": x, "head": head, "real_uncond": uncond, "guidance_scale": 1.75, "sample_weight": torch.rand(3)}
    matching = dk.matching_loss(leaf, real, fake, **guided)
    lying, lying_grad = dk.matching_loss_and_grad(x0, nhwc[0], nhwc[1], **(guided | {"real_uncond": nhwc[2]}))
    double, double_grad = dk.matching_loss_and_grad(x0.double(), real, fake)  # in chunks
    denoising = dk.denoising_loss(leaf, real, torch.rand(3), x=x, head=head)
    parts, slope = dk.denoising_loss_and_grad(nhwc[0], x0, torch.rand(3), x=x, head=head)
    critic = dk.gan_critic_loss(gen, data, perturbed_data_logits=moved, r1_weight=0.3)
    generator = dk.gan_generator_loss(gen, kind="hinge")
    (matching.loss + denoising.loss + critic.loss + generator.loss).backward()
    sums, slopes = dk.gan_critic_loss_and_grad(gen, data)
    more, last = dk.gan_generator_loss_and_grad(gen)
    together = (*lying, lying_grad, *double, double_grad, *parts, slope, *sums, *slopes[:2], *more, last)
    leaves = [t.grad for t in (leaf, gen, data, moved)]
    return [t.detach() for t in (*matching, *denoising, *critic, *generator, *together, *leaves)]


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


def test_meter_matching_gradient_is_at_the_floor_in_one_launch() -> None:
    x0, real, fake, x, uncond = torch.randn(5, 2, 4, 64, 64)
    head = dk.LinearHead.edm(torch.tensor([0.1, 10.0]), 0.5)
    with metered() as meter:
        dk.matching_loss_and_grad(x0, real, fake, x=x, head=head, real_uncond=uncond, guidance_scale=8.0)
    (whole,) = meter.launches
    assert [whole.reads(n) for n in ("x0", "real", "fake", "x", "uncond", "a")] == [1] * 6
    assert [whole.writes(n) for n in ("grad", "terms", "weight", "squares", "nonfinite")] == [1] * 5


def test_meter_matching_gradient_of_a_larger_sample_reads_the_scores_twice() -> None:
    """First what the normaliser needs, at most 4 reads, then what the direction needs, at most 3, and 1 write."""
    x0, real, fake, x, uncond = torch.randn(5, 1, 4, 128, 128)
    head = dk.LinearHead.edm(torch.tensor([0.1]), 0.5)
    with metered() as meter:
        dk.matching_loss_and_grad(x0, real, fake, x=x, head=head, real_uncond=uncond, guidance_scale=8.0)
    first, second = meter.launches
    assert [first.reads(n) for n in ("x0", "real", "x", "uncond")] == [1] * 4
    assert "fake" not in first.arguments
    assert [second.reads(n) for n in ("real", "fake", "uncond")] == [1] * 3
    assert not {"x0", "x"} & set(second.arguments)
    assert [second.writes(n) for n in ("grad", "terms", "weight", "squares", "nonfinite")] == [1] * 5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_meter_denoising_gradient_is_at_the_floor_in_one_launch(layout: torch.memory_format) -> None:
    out, target, x = torch.randn(3, 1, 4, 128, 128)
    head = dk.LinearHead.edm(torch.tensor([10.0]), 0.5)
    with metered() as meter:
        dk.denoising_loss_and_grad(out.contiguous(memory_format=layout), target, torch.ones(1), x=x, head=head)
    (launch,) = meter.launches
    assert [launch.reads(n) for n in ("out", "target", "x")] == [1, 1, 1]
    assert [launch.writes(n) for n in ("grad", "terms")] == [1, 1]


def test_meter_gan_gradients_are_at_the_floor_in_one_launch_of_any_size() -> None:
    gen, data = torch.randn(2500), torch.randn(1025)
    with metered() as meter:
        sums, _ = dk.gan_critic_loss_and_grad(gen, data)
        dk.gan_generator_loss_and_grad(gen)
    critic, generator = meter.launches
    assert [critic.reads(n) for n in ("gen", "data")] == [critic.writes(n) for n in ("d_gen", "d_data")] == [1, 1]
    assert (generator.reads("gen"), generator.writes("d_gen")) == (1, 1)
    exact = torch.nn.functional.softplus(gen.double()).mean() + torch.nn.functional.softplus(-data.double()).mean()
    torch.testing.assert_close(sums.loss.double(), exact, rtol=5e-7, atol=0)


@pytest.mark.parametrize(
    ("shape", "layout", "forward_reads", "backward_reads"),
    [
        ((1, 12, 32, 32), torch.contiguous_format, {"forward": 1}, {"backward": 1}),
        ((1, 12, 64, 64), torch.contiguous_format, {"forward": 2}, {"backward": 2}),
        ((1, 12, 16, 16), torch.channels_last, {"forward": 1}, {"backward": 1}),
        ((1, 12, 36, 32), torch.channels_last, {"moments": 1, "apply": 1}, {"slope_sums": 1, "apply_slopes": 1}),
    ],
    ids=["in registers", "in tiles", "small channels_last", "channels_last"],
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
