"""Loads weight files; names and shapes are checked against the network before anything is copied."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dmd2.errors import UserError
from dmd2.teachers.safe_pickle import read_edm_pickle
from dmd2.teachers.torch_file import read_torch_file

SHOWN = 3  # names in an error
READERS = {".pkl": read_edm_pickle, ".bin": read_torch_file, ".pt": read_torch_file, ".pth": read_torch_file}


def load_weights(module: nn.Module, path: Path | str) -> None:
    """Copies a weight file into `module`, in the module's dtypes.

    See `read_weights`. Raises UserError naming the file if it cannot be read, or if a name or shape differs; the module
    is then unchanged.
    """
    state = read_weights(path)
    check_state(state, module.state_dict(), str(path))
    module.load_state_dict(state)


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """Reads a state dict from `.safetensors`, torch's `.bin`, `.pt` or `.pth`, or EDM's `.pkl`.

    Nothing in the file is executed. Raises UserError naming the file if it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weight file; put it there or correct the configured path")
    if path.suffix in READERS:
        return READERS[path.suffix](path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: unknown kind of weight file; use .safetensors, torch's .bin, or EDM's .pkl")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); fetch or export it again") from None


def read_network(path: Path | str, expected: Mapping[str, Tensor], *, prefix: str = "") -> dict[str, Tensor]:
    """Reads the tensors of the state dict `expected` from a weight file, in its order and dtypes.

    `expected` may have meta tensors. `prefix` selects one of several networks in the file. Raises UserError if a name
    or shape differs, or if a value is not finite.
    """
    state = {k.removeprefix(prefix): v for k, v in read_weights(path).items() if k.startswith(prefix)}
    check_state(state, expected, f"{path}: {prefix}*" if prefix else str(path))
    bad = [name for name, value in state.items() if not torch.isfinite(value).all()]
    if bad:
        raise UserError(f"{path}: {_few('containing NaN or infinity', bad)}; download it again")
    return {name: state[name].to(want.dtype) for name, want in expected.items()}


def check_state(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Raises UserError with the first few names that are missing, unexpected, or differ in shape or kind of dtype.

    Fixed filters (`resample_filter`) must also have EDM's values, since the network does not read them.
    """
    problems = [
        _few("missing", [name for name in expected if name not in found]),
        _few("unexpected", [name for name in found if name not in expected]),
        _few("mismatching", [text for name in expected if name in found for text in _mismatch(name, found, expected)]),
    ]
    if any(problems):
        listed = "; ".join(problem for problem in problems if problem)
        raise UserError(f"{where}: not the weights of the configured network: {listed}; correct `network` or the file")


def _mismatch(name: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    have, want = found[name], expected[name]
    if have.shape != want.shape:
        return [f"{name} {tuple(have.shape)} for {tuple(want.shape)}"]
    if have.is_floating_point() != want.is_floating_point():
        return [f"{name} {have.dtype} for {want.dtype}"]
    if name.endswith("resample_filter") and not torch.all(have == 0.25):
        return [f"{name} is not the 2x2 box filter"]
    return []


def _few(kind: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {kind}: {', '.join(names[:SHOWN])}{more}"
