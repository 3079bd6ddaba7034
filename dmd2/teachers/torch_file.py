"""Reads state dicts that `torch.save` wrote, without executing anything in them.

torch's restricted loader does the reading. Before it, the pickles inside are walked opcode by opcode: what that loader
would still call for a hostile file (a bytearray of any size, say) is refused, as are archives that unpack to more than
their size.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from dmd2.errors import UserError

STORAGES = frozenset(
    f"torch.{kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Bool")
)
KNOWN = STORAGES | {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
}
"""Globals of state dicts."""
REFUSED = frozenset(
    {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"}
    | {"BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER"}
)
"""Opcodes that no state dict holds: other ways to name a class, and memory without data."""
ZIP = b"PK\x03\x04"
"""What torch, too, tells its two formats apart by."""
OLD_PICKLES = 5
"""Pickles in a file of torch before 1.6: magic number, version, system, the content, keys of the storages."""
MOST_TUPLES = 20_000
"""In one pickle; a tensor takes four. Hashing tuples that lie in one another exhausts the stack at some 100,000."""


def read_torch_file(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a state dict by name, on the CPU; large files are mapped and not read.

    A prefix `module.` that all names share, which data-parallel wrappers leave, is dropped. Raises UserError naming the
    file, and the blocked global if there is one.
    """
    path = Path(path)
    with reading(path, "a state dict of torch.save"):
        with path.open("rb") as file:
            zipped = file.read(len(ZIP)) == ZIP
            file.seek(0)
            if not zipped:
                check_old_file(file)
        if zipped:
            _check_archive(path)
        return _state_dict(torch.load(path, map_location="cpu", weights_only=True, mmap=zipped))


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


def check_old_file(file: IO[bytes]) -> None:
    """Raises UserError for a file of torch before 1.6 that holds more than tensors or one storage."""
    for _ in range(OLD_PICKLES):
        _check_pickle(file)


def _check_archive(path: Path) -> None:
    """Raises UserError for an archive that holds more than tensors, or that unpacks to more than its size."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(Path(entry.filename).name == "constants.pkl" for entry in entries):
            raise UserError("a TorchScript archive, not a state dict; name the file of a state dict")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise UserError("a compressed archive, which torch.save does not write; get the file from its publisher")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise UserError("an archive whose entries overlap; get the file from its publisher")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                _check_pickle(io.BytesIO(archive.read(entry)))


def _check_pickle(file: IO[bytes]) -> None:
    """Walks one pickle up to its end."""
    num_tuples = 0
    for opcode, argument, _ in pickletools.genops(file):
        num_tuples += opcode.name.startswith("TUPLE")
        if num_tuples > MOST_TUPLES:
            raise UserError(f"more than {MOST_TUPLES} tuples in a pickle; get the file from its publisher")
        if opcode.name in REFUSED:
            raise UserError(f"opcode {opcode.name}, which no state dict holds; get the file from its publisher")
        if opcode.name == "GLOBAL" and (name := str(argument).replace(" ", ".")) not in KNOWN:
            raise UserError(f"blocked global {name[:100]!r}: not part of a state dict; get the file from its publisher")


def _state_dict(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"holds {type(content).__name__}, not a state dict; name the file with the network's weights")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(
                f"entry {str(name)[:100]!r} is {type(value).__name__}, not a tensor; name the file of a state dict"
            )
    if all(name.startswith("module.") for name in content):
        return {name.removeprefix("module."): value for name, value in content.items()}
    return dict(content)
