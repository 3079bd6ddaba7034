"""Weight files and what a network expects of them: names and shapes, compared before anything is copied."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dmd2 import records
from dmd2.errors import UserError
from dmd2.teachers.safe_pickle import read_edm_pickle

SHOWN = 3  # names in an error


def load_weights(module: nn.Module, path: Path | str) -> None:
    """Copies a weight file into `module`, in the module's dtypes.

    `.safetensors` holds a state dict; `.pkl` is EDM's own format, of which nothing is executed. Raises UserError naming
    the file if it cannot be read, or if a name or shape differs; the module is then unchanged.
    """
    state = read_weights(path)
    check_state(state, module.state_dict(), str(path))
    module.load_state_dict(state)


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """The tensors in a `.safetensors` or EDM `.pkl` file by name."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weight file; put it there or correct the configured path")
    if path.suffix == ".pkl":
        return read_edm_pickle(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: unknown kind of weight file; use .safetensors, or EDM's .pkl")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); fetch or export it again") from None


def import_edm(pickle_path: Path | str, out: Path | str, expected: Mapping[str, Tensor]) -> None:
    """Writes the network of an EDM pickle as safetensors, after comparing it with the state dict `expected`.

    `expected` may hold meta tensors. Raises UserError if a name or shape differs; nothing is then written.
    """
    state = read_edm_pickle(pickle_path)
    check_state(state, expected, str(pickle_path))
    with records.atomic(out) as temporary:
        save_file(state, temporary)


def check_sha256(path: Path | str, wanted: str | None) -> None:
    """Refuses a file whose SHA-256 is not `wanted`; None accepts any."""
    if wanted is None:
        return
    if not Path(path).is_file():
        raise UserError(f"{path}: no such weight file; put it there or correct the configured path")
    if (found := records.sha256(path)) != wanted:
        raise UserError(f"{path}: its SHA-256 is {found}, configured is {wanted}; fetch it again or correct `sha256`")


def check_state(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Raises UserError with the first few names that are missing, unexpected or of another shape or kind.

    Fixed filters (`resample_filter`) must also hold EDM's values, since the network computes without them.
    """
    problems = [
        _few("missing", [name for name in expected if name not in found]),
        _few("unexpected", [name for name in found if name not in expected]),
        _few("mismatching", [text for name in expected if name in found for text in _mismatch(name, found, expected)]),
    ]
    if any(problems):
        told = "; ".join(problem for problem in problems if problem)
        raise UserError(f"{where}: not the weights of the configured network: {told}; correct `network` or the file")


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
