"""GroupNorm+SiLU in Triton against the definition in float64: layouts, group sizes of ADM-64, offsets, dtypes."""

import pytest
import torch
from closeness import assert_relative, assert_rounded_once
from torch import Tensor

import dmd2_kernels as dk

pytestmark = pytest.mark.usefixtures("triton_path")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
NAMES = ("x", "weight", "bias", "scale", "shift")


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str, offset: float = 0.0) -> dict[str, Tensor]:
    torch.manual_seed(0)
    batch, channels = shape[:2]
    made = {
        "x": (torch.randn(shape) + offset).to(dtype),
        "weight": 1 + 0.3 * torch.randn(channels),
        "bias": 0.3 * torch.randn(channels),
        "scale": (0.3 * torch.randn(batch, channels)).to(dtype),
        "shift": (0.3 * torch.randn(batch, channels)).to(dtype),
    }
    return {name: t.to(device) for name, t in made.items()}


def run(made: dict[str, Tensor], groups: int, dy: Tensor, adaptive: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients by name."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in made.items()}
    rows = {name: leaves[name] for name in ("scale", "shift")} if adaptive else {}
    out = dk.group_norm_silu(leaves["x"], groups, leaves["weight"], leaves["bias"], **rows)
    out.backward(dy)
    return out.detach(), {name: t.grad for name, t in leaves.items() if t.grad is not None}


def compare(
    shape: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
    device: str,
    layout: torch.memory_format = torch.contiguous_format,
    adaptive: bool = True,
) -> None:
    made = inputs(shape, dtype, device)
    made["x"] = made["x"].contiguous(memory_format=layout)
    dy = torch.randn(shape).to(dtype).to(device)
    out, grads = run(made, groups, dy, adaptive)
    with dk.use("reference"):
        exact, exact_grads = run({name: t.double() for name, t in made.items()}, groups, dy.double(), adaptive)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=layout)
    assert_rounded_once(out, exact, noise=1e-6)
    assert grads.keys() == exact_grads.keys()
    for name, grad in grads.items():
        assert grad.dtype == made[name].dtype
        assert_rounded_once(grad, exact_grads[name], noise=2e-6)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("group_channels", [6, 12, 18, 24, 30, 36, 42, 48])
def test_fp64_every_group_size_of_adm64(group_channels: int, layout: torch.memory_format, device: str) -> None:
    dtype = DTYPES[group_channels // 6 % 3]
    compare((1, 2 * group_channels, 8, 8), 2, dtype, device, layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fp64_plain_and_adaptive_on_ragged_sizes(
    dtype: torch.dtype, adaptive: bool, layout: torch.memory_format, device: str
) -> None:
    compare((2, 12, 5, 7), 3, dtype, device, layout, adaptive)


@pytest.mark.parametrize("shape", [(3, 24), (2, 8, 1, 1), (2, 6, 37), (1, 4, 3, 5, 7)])
def test_fp64_any_number_of_pixel_dimensions(shape: tuple[int, ...], device: str) -> None:
    compare(shape, 2, torch.float32, device)


@pytest.mark.parametrize(("shape", "groups"), [((1, 12, 64, 64), 2), ((1, 18, 64, 64), 1)])
def test_fp64_full_size_groups_in_registers_and_in_tiles(shape: tuple[int, ...], groups: int, device: str) -> None:
    compare(shape, groups, torch.bfloat16, device)


def test_fp64_channels_last_over_many_blocks(device: str) -> None:
    compare((2, 72, 40, 40), 4, torch.float32, device, torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("offset", "rtol"), [(30, 2e-6), (300, 2e-5), (3000, 2e-4)])
@pytest.mark.parametrize("side", [8, 64])
def test_a_large_mean_does_not_cancel(
    offset: float, rtol: float, side: int, layout: torch.memory_format, device: str
) -> None:
    made = inputs((1, 12, side, side), torch.float32, device, offset)
    x = made["x"].contiguous(memory_format=layout)
    out = dk.group_norm_silu(x, 1, made["weight"], made["bias"])
    with dk.use("reference"):
        exact = dk.group_norm_silu(x.double(), 1, made["weight"].double(), made["bias"].double())
    assert (out.double() - exact).abs().max() <= rtol * exact.abs().max()


def test_an_outlier_first_element_does_not_spoil_the_variance(device: str) -> None:
    x = torch.randn(1, 12, 64, 64) + 3000
    x[0, 0, 0, 0] = 0
    one, zero = torch.ones(12, device=device), torch.zeros(12, device=device)
    out = dk.group_norm_silu(x.to(device), 1, one, zero, silu=False)
    exact = torch.nn.functional.group_norm(x.double(), 1).to(device)
    assert (out.double() - exact).abs().max() <= 2e-4 * exact.abs().max()


def test_statistics_are_float32_within_5e_7(device: str) -> None:
    x = inputs((2, 24, 16, 16), torch.bfloat16, device, offset=1.0)["x"]
    w = torch.ones(24, device=device)
    _, mean, rstd, _ = torch.ops.dmd2.group_norm_silu(x, 4, w, w, 1e-5, None, None, True)
    groups = x.double().reshape(2, 4, -1)
    assert_relative(mean, groups.mean(2))
    assert_relative(rstd, (groups.var(2, correction=0) + 1e-5).rsqrt())


def test_adaptive_rows_may_be_views_of_one_embedding(device: str) -> None:
    made = inputs((2, 8, 4, 4), torch.float32, device)
    scale, shift = torch.randn(2, 16, device=device).chunk(2, dim=1)
    out = dk.group_norm_silu(made["x"], 2, made["weight"], made["bias"], scale=scale, shift=shift)
    with dk.use("reference"):
        exact = dk.group_norm_silu(made["x"], 2, made["weight"], made["bias"], scale=scale, shift=shift)
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-6)
