"""What a checkpoint is made of: a tree of plain values and tensors, and the tensors' rows in one file for each rank.

    step-00001000-0.safetensors   rank 0: its rows of sharded tensors, and every tensor that the ranks hold whole
    step-00001000-1.safetensors   rank 1: its rows; there for sharded networks alone
    step-00001000.json            the manifest: step, digest, files with their SHA-256, shapes, rows, plain values

Nothing is pickled, so reading a checkpoint runs no code, and any number of ranks in any layout can read it: each takes
the rows that it needs from the files that have them. (torch.distributed.checkpoint pickles its metadata.)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dmd2.errors import UserError
from dmd2.files import read_json, sha256
from dmd2.training import ranks, sharding


def pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON can hold it, its tensors moved to `tensors` under the names of their places.

    Mappings, lists and tuples of tensors, numbers, strings, booleans and None; keys are strings or integers.
    """
    if isinstance(value, Tensor):
        if name in tensors:
            raise ValueError(f"two places of the state are called {name}")
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"map": [[key, pack(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [pack(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name}: a checkpoint cannot hold {type(value).__name__}")


def unpack(tree: Any, read: Callable[[str], Tensor]) -> Any:
    """The state that `pack` took apart, its tensors as `read` gives them."""
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return read(content)
    if kind == "map":
        return {key: unpack(item, read) for key, item in content}
    items = [unpack(item, read) for item in content]
    return items if kind == "list" else tuple(items)


class Piece(NamedTuple):
    """What one rank writes of a tensor."""

    tensor: Tensor
    rows: tuple[int, int] | None  # of the whole tensor; None where this is the whole


def pieces(tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
    """This rank's part: its rows of sharded tensors; of the others all on the first rank, nothing elsewhere."""
    found = {}
    for name, tensor in tensors.items():
        if sharding.is_sharded(tensor):
            rows = sharding.rows(tensor)
            if rows[1] > rows[0]:
                found[name] = Piece(sharding.local(tensor), rows)
        elif ranks.rank() == 0:
            found[name] = Piece(tensor.detach(), None)
    return found


class Held(NamedTuple):
    """Tensors that nobody else changes; on a GPU's host they are complete after `wait`."""

    pieces: dict[str, Piece]
    wait: Callable[[], None]


def hold(part: Mapping[str, Piece], *, copy: bool) -> Held:
    """The pieces on the host; with `copy` apart from the memory they came from, so that training may go on.

    From a GPU they are copied in the stream's order into pinned memory, without waiting.
    """
    is_cuda = any(piece.tensor.is_cuda for piece in part.values())

    def host(tensor: Tensor) -> Tensor:
        if tensor.is_cuda:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            return empty.copy_(tensor, non_blocking=True)
        return tensor.clone(memory_format=torch.contiguous_format) if copy else tensor.contiguous()

    held = {name: Piece(host(piece.tensor), piece.rows) for name, piece in part.items()}
    if not is_cuda:
        return Held(held, lambda: None)
    done = torch.cuda.Event()
    done.record()
    return Held(held, done.synchronize)


def write_part(path: Path, part: Mapping[str, Piece]) -> None:
    """Writes a rank's pieces."""
    save_file({name: piece.tensor for name, piece in part.items()}, path)


def describe_part(path: Path, part: Mapping[str, Piece]) -> dict[str, Any]:
    """What the manifest says of a written part: its checksum, and which rows of sharded tensors are in it."""
    rows = {name: list(piece.rows) for name, piece in part.items() if piece.rows is not None}
    return {"file": path.name, "sha256": sha256(path), "bytes": path.stat().st_size, "rows": rows}


def layout_of(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """The shapes of the sharded tensors, whose rows lie in several files."""
    return {name: list(tensor.shape) for name, tensor in tensors.items() if sharding.is_sharded(tensor)}


def seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with a checksum of its own content."""
    content = {key: value for key, value in manifest.items() if key != "seal"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return {**content, "seal": hashlib.sha256(text.encode()).hexdigest()}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest in `path`. Raises UserError where it is missing, or not as it was written."""
    manifest = read_json(path)
    if manifest.get("seal") != seal(manifest)["seal"]:
        raise UserError(f"{path}: damaged (its content differs from what was sealed)")
    return manifest


def verify(folder: Path, files: list[dict[str, Any]]) -> None:
    """Checks this rank's share of the files against their checksums. Raises UserError naming the damaged one."""
    for number, entry in enumerate(files):
        path = folder / _plain(entry["file"])
        if not path.exists():
            raise UserError(f"{path}: missing, though the checkpoint's JSON exists")
        if path.stat().st_size != entry["bytes"]:
            raise UserError(f"{path}: damaged (its size differs from the one recorded)")
        mine = number % ranks.world_size() == ranks.rank() % ranks.world_size()
        if mine and sha256(path) != entry["sha256"]:
            raise UserError(f"{path}: damaged (its SHA-256 differs from the one recorded)")


def _plain(name: str) -> str:
    """A file's name, which must lie beside its manifest."""
    if os.path.basename(name) != name:
        raise UserError(f"{name}: not a file beside the checkpoint's JSON")
    return name


class Reader:
    """The tensors of the files of one checkpoint."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]):
        self._shapes: dict[str, list[int]] = manifest["shapes"]
        self._files = [safe_open(folder / _plain(entry["file"]), framework="pt") for entry in manifest["files"]]
        self._rows = [entry["rows"] for entry in manifest["files"]]

    def read(self, name: str, like: Tensor | None = None) -> Tensor:
        """The tensor `name`: this rank's rows where `like`, the tensor it is to replace, is sharded, else the whole."""
        if like is None or not sharding.is_sharded(like):
            shape = self._shapes.get(name)
            return self._files[0].get_tensor(name) if shape is None else self._join(name, 0, shape[0])
        start, stop = sharding.rows(like)
        part = self._join(name, start, stop) if name in self._shapes else self._files[0].get_slice(name)[start:stop]
        return sharding.as_part_of(part.to(sharding.local(like).device), like)

    def _join(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start .. stop-1 of a tensor that lies in several files."""
        found = list(self._overlaps(name, start, stop))
        if sum(len(part) for part in found) != stop - start:
            raise UserError(f"rows {start} to {stop} of {name} are not all in the checkpoint's files")
        if found:
            return torch.cat(found)
        return self._files[0].get_slice(name)[0:0]

    def _overlaps(self, name: str, start: int, stop: int) -> Iterator[Tensor]:
        for file, rows in zip(self._files, self._rows, strict=True):
            low, high = rows.get(name, (0, 0))
            if max(low, start) < min(high, stop):
                yield file.get_slice(name)[max(low, start) - low : min(high, stop) - low]
