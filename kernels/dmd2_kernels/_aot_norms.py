"""The cases of `aot.py` for GroupNorm+SiLU and for the sum at a block's end."""

from collections.abc import Callable

import torch

from . import _library_norm, ops, shapes


def _norm(
    channels: int, side: int, groups: int, adaptive: bool, nhwc: bool, added: str = ""
) -> Callable[[torch.dtype], None]:
    """`added` is what is added before the norm: nothing, `bias`, or `sum` for a bias and a residual."""

    def run(dtype: torch.dtype) -> None:
        x, w = torch.empty(2, channels, side, side, dtype=dtype), torch.empty(channels)
        row = torch.empty(2, channels, dtype=dtype) if adaptive else None
        x = x.to(memory_format=torch.channels_last) if nhwc else x
        bias, residual = w if added else None, x if added == "sum" else None
        _, mean, rstd, _ = _library_norm._forward(x, groups, w, w, 1e-5, row, row, True, bias, residual)
        _library_norm._backward(
            x, x, mean, rstd, groups, w, w, row, row, True, bias, is_total=added == "sum", d_total=residual
        )

    return run


def _residual_sum(shape: tuple[int, ...], nhwc: bool) -> Callable[[torch.dtype], None]:
    def run(dtype: torch.dtype) -> None:
        x = torch.empty(shape, dtype=dtype)
        x = x.to(memory_format=torch.channels_last) if nhwc else x
        ops.residual_sum.forward(x, x, torch.empty(shape[1]), 1.0, nhwc)

    return run


def norm_cases() -> dict[str, Callable[[torch.dtype], None]]:
    """All compiled calls by name; `ragged` in a name means sizes that do not allow wide accesses."""
    found = {
        "norm ragged 12ch 5x5": _norm(12, 5, 2, adaptive=True, nhwc=False),
        "norm ragged 12ch 1x1": _norm(12, 1, 2, adaptive=False, nhwc=False),
        "norm nhwc ragged 12ch 5x5": _norm(12, 5, 2, adaptive=True, nhwc=True),
        "norm plain 192ch 64x64": _norm(192, 64, shapes.ADM_GROUPS, adaptive=False, nhwc=False),
    }
    for channels, side in shapes.ADM_NORMS:
        name = f"{channels}ch {side}x{side}"
        found[f"norm {name}"] = _norm(channels, side, shapes.ADM_GROUPS, adaptive=True, nhwc=False)
    for channels, side in shapes.ADM_NORMS[::5]:  # their tiles don't depend on the group size
        name = f"norm nhwc {channels}ch {side}x{side}"
        found[name] = _norm(channels, side, shapes.ADM_GROUPS, adaptive=True, nhwc=True)
    for channels, side in ((192, 64), (384, 64), (384, 32), (768, 32), (576, 16), (768, 16), (768, 8)):
        for added in ("bias", "sum"):
            for layout in ("nchw", "nhwc"):
                name = f"norm {layout} {added} {channels}ch {side}x{side}"
                found[name] = _norm(channels, side, shapes.ADM_GROUPS, added == "bias", layout == "nhwc", added)
    for channels, side in ((320, 64), (640, 32), (1280, 16), (2560, 16)):  # SD and SDXL
        found[f"norm nhwc bias {channels}ch {side}x{side}"] = _norm(channels, side, 32, False, True, "bias")
    for layout in ("nchw", "nhwc"):
        found[f"residual sum {layout} 192ch 64x64"] = _residual_sum((2, 192, 64, 64), layout == "nhwc")
    for name, (_, channels, side) in shapes.HEAD_NORMS.items():
        found[f"norm {name}"] = _norm(channels, side, 32, adaptive=False, nhwc=False)
    return found
