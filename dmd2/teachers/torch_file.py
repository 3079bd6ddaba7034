"""Reads state dicts that `torch.save` wrote, without executing anything in them: `torch.load(weights_only=True)`.

That loader builds tensors and plain containers and refuses every other global that a file names. A hostile file can
still exhaust memory, as any large file can.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from dmd2.errors import UserError

ZIP = b"PK\x03\x04"
"""The first bytes of a file that torch can map to memory; those of torch before 1.6 have others."""


def read_torch_file(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a state dict by name, on the CPU; large files are mapped and not read.

    Raises UserError naming the file, and the blocked global if there is one.
    """
    path = Path(path)
    with reading(path, "a state dict of torch.save"):
        with path.open("rb") as file:
            zipped = file.read(len(ZIP)) == ZIP
        return _state_dict(load_tensors(path, mmap=zipped))


def load_tensors(file: Path | IO[bytes], *, mmap: bool = False) -> Any:
    """What torch's restricted loader reads from `file`. Raises UserError for a global that it does not allow."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except RuntimeError as error:
        if "TorchScript" in str(error):
            raise UserError("a TorchScript archive, not a state dict; name the file of a state dict") from None
        raise
    except pickle.UnpicklingError as error:
        if blocked := re.search(r"GLOBAL (\S+)", str(error)):
            name = blocked[1][:100]
            raise UserError(f"blocked global {name!r}: not part of a state dict; get it from its publisher") from None
        reason = str(error).rpartition("WeightsUnpickler error: ")[2]  # before it: how to switch the restriction off
        raise pickle.UnpicklingError(reason.strip().partition("\n")[0]) from None


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Whatever goes wrong in the block as a UserError of one line that names the file; `kind` is what it should be."""
    if not path.is_file():
        raise UserError(f"{path}: no such weight file; put it there or correct the configured path")
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # what damaged bytes make of a reader is not one family
        raise UserError(f"{path}: not {kind}, or truncated ({brief(error)}); fetch it again") from None


def brief(error: Exception) -> str:
    """The error on one line of bounded length."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _state_dict(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"holds {type(content).__name__}, not a state dict; name the file with the network's weights")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(
                f"entry {str(name)[:100]!r} is {type(value).__name__}, not a tensor; name the file of a state dict"
            )
    return dict(content)
