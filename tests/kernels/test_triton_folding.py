"""Biases and residuals that the norm adds as it reads, and the sum at a block's end: float64, bytes."""

from typing import Any

import pytest
import torch
from closeness import assert_rounded_once
from meter import metered
from torch import Tensor

import dmd2_kernels as dk

pytestmark = pytest.mark.usefixtures("triton_path")
NCHW, NHWC = torch.contiguous_format, torch.channels_last
SHAPES = {
    "nchw": ((2, 12, 5, 7), 3, NCHW),
    "nchw in tiles": ((1, 12, 64, 64), 1, NCHW),
    "nhwc once": ((2, 48, 8, 8), 4, NHWC),
    "nhwc once ragged": ((2, 48, 5, 7), 4, NHWC),
    "nhwc in two passes": ((2, 18, 19, 17), 3, NHWC),
}


def leaves(shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype, rows: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    batch, channels = shape[:2]
    made = {
        "x": torch.randn(shape).to(dtype, memory_format=layout),
        "residual": torch.randn(shape).to(dtype, memory_format=layout),
        "channel_bias": 2 * torch.randn((batch, channels) if rows else (channels,)),
        "weight": 1 + 0.3 * torch.randn(channels),
        "bias": 0.3 * torch.randn(channels),
        "scale": (0.3 * torch.randn(batch, channels)).to(dtype),
        "shift": (0.3 * torch.randn(batch, channels)).to(dtype),
    }
    return {name: t.requires_grad_() for name, t in made.items()}


def run(made: dict[str, Tensor], groups: int, upstream: list[Tensor], what: str) -> dict[str, Tensor]:
    """Outputs and gradients by name. `what` is bias, sum (whose total is used too) or end."""
    of_norm = {name: made[name] for name in ("scale", "shift")}
    args = (groups, made["weight"], made["bias"])
    if what == "bias":
        outs = [dk.group_norm_silu(made["x"], *args, channel_bias=made["channel_bias"], **of_norm)]
    elif what == "sum":
        more = {"channel_bias": made["channel_bias"], "sum_scale": 0.7, **of_norm}
        outs = list(dk.sum_group_norm_silu(made["x"], made["residual"], *args, **more))
    else:
        outs = [dk.residual_sum(made["x"], made["residual"], made["channel_bias"], 0.7)]
    torch.autograd.backward(outs, upstream[: len(outs)])
    grads = {name: t.grad for name, t in made.items() if t.grad is not None}
    return {f"out{i}": out.detach() for i, out in enumerate(outs)} | grads


def cases() -> list[Any]:
    found = [pytest.param(shape, what, False, id=f"{shape} {what}") for shape in SHAPES for what in ("bias", "sum")]
    found += [pytest.param(shape, "bias", True, id=f"{shape} rows") for shape in SHAPES if "ragged" not in shape]
    return found + [pytest.param(shape, "end", False, id=f"{shape} end") for shape in ("nchw", "nhwc in two passes")]


@pytest.mark.parametrize(("name", "what", "rows"), cases())
def test_outputs_and_all_gradients_are_those_of_float64(name: str, what: str, rows: bool, device: str) -> None:
    shape, groups, layout = SHAPES[name]
    for dtype in (torch.float32, torch.bfloat16):
        made = {k: t.detach().to(device).requires_grad_() for k, t in leaves(shape, layout, dtype, rows).items()}
        upstream = [torch.randn(shape).to(device, dtype) for _ in range(2)]
        found = run(made, groups, upstream, what)
        exactly = {k: t.detach().double().requires_grad_() for k, t in made.items()}
        if what == "sum":  # the norm is of the rounded sum
            total = found["out1"].double()
            bias = made["channel_bias"].detach().double().reshape(1, -1, 1, 1)
            exactly["x"] = (total / 0.7 - bias - made["residual"].detach().double()).requires_grad_()
        with dk.use("reference"):
            exact = run(exactly, groups, [t.double() for t in upstream], what)
            if what == "sum":
                rounded = dk.residual_sum(*(made[k].detach().double() for k in ("x", "residual", "channel_bias")), 0.7)
                assert_rounded_once(found["out1"], rounded, noise=1e-6)
        assert found.keys() == exact.keys()
        assert found["out0"].is_contiguous(memory_format=layout)
        for key, value in found.items():
            assert value.dtype == (made[key].dtype if key in made else dtype)
            if key == "channel_bias":  # a sum over pixels whose terms cancel, as the norm removes their mean
                assert (value.double() - exact[key]).abs().max() <= 4e-6 * exact[key].abs().max()
            elif (what, key) != ("sum", "out1"):
                assert_rounded_once(value, exact[key], noise=2e-6)


@pytest.mark.parametrize("what", ["bias", "sum", "end"])
def test_the_reference_is_the_plain_expression(what: str) -> None:
    made = leaves((2, 6, 3, 4), NCHW, torch.float64, rows=False)
    upstream = [torch.randn(2, 6, 3, 4, dtype=torch.float64) for _ in range(2)]
    with dk.use("reference"):
        found = run(made, 3, upstream, what)
    for t in made.values():
        t.grad = None
    x = made["x"] + made["channel_bias"].reshape(1, -1, 1, 1)
    x = 0.7 * (x + made["residual"]) if what != "bias" else x
    norm = torch.nn.functional.group_norm(x, 3, made["weight"].double(), made["bias"].double())
    more, shift = (made[k].reshape(2, 6, 1, 1) for k in ("scale", "shift"))
    outs = [x] if what == "end" else [torch.nn.functional.silu(norm * (1 + more) + shift), x]
    outs = outs[: 2 if what == "sum" else 1]
    torch.autograd.backward(outs, upstream[: len(outs)])
    for i, out in enumerate(outs):
        torch.testing.assert_close(found[f"out{i}"], out.detach())
    for name, t in made.items():
        if t.grad is not None:
            torch.testing.assert_close(found[name], t.grad)


# (reads of x and residual, writes of y and total; reads of dy and the saved tensor, of d_total, writes of dx)
BYTES = {
    "nchw": ((1, 1), (1, 1)),
    "nchw in tiles": ((1, 1), (2, 1)),
    "nhwc once": ((1, 1), (1, 1)),
    "nhwc in two passes": ((1, 1), (2, 1)),
}


@pytest.mark.parametrize("order", ["forward", "reversed"])
@pytest.mark.parametrize("name", list(BYTES))
def test_meter_a_sum_is_read_once_and_written_once(name: str, order: str) -> None:
    shape, groups, layout = SHAPES[name]
    made = leaves(shape, layout, torch.bfloat16, rows=False)
    upstream = [torch.randn(shape).to(torch.bfloat16, memory_format=layout) for _ in range(2)]
    with metered(order) as meter:
        found = run(made, groups, upstream, "sum")
    plain = run({k: t.detach().requires_grad_() for k, t in made.items()}, groups, upstream, "sum")
    assert all(torch.equal(found[k], plain[k]) for k in plain), "bits do not depend on the order of programs"
    (reads, writes), (slopes, others) = BYTES[name]
    of = {(each.kernel, key): each for each in meter.launches for key in each.arguments}
    for key, count in (("residual", reads), ("total", writes)):
        at = next(each for (_, arg), each in of.items() if arg == key)
        assert (at.reads if key == "residual" else at.writes)(key) == count
    total = sum(each.reads("dy") for each in meter.launches if "dy" in each.arguments)
    assert total == slopes
    assert sum(each.reads("d_total") for each in meter.launches if "d_total" in each.arguments) == others
    assert sum(each.writes("dx") for each in meter.launches if "dx" in each.arguments) == 1


def test_arguments_that_do_not_fit_are_named(device: str) -> None:
    x, one = torch.randn(2, 6, 3, 3, device=device), torch.ones(6, device=device)
    with pytest.raises(ValueError, match=r"^channel_bias has shape \(3, 6\); it must be \(2, 6\)"):
        dk.group_norm_silu(x, 2, one, one, channel_bias=torch.ones(3, 6, device=device))
    with pytest.raises(ValueError, match=r"^residual has shape \(2, 6, 3, 4\) but x has"):
        dk.sum_group_norm_silu(x, torch.randn(2, 6, 3, 4, device=device), 2, one, one)
    with pytest.raises(ValueError, match=r"^channel_bias has shape \(2, 6\); it must be \(6,\)"):
        dk.residual_sum(x, x, torch.ones(2, 6, device=device))
