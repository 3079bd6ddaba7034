"""Checkpoint format: one safetensors file per rank and a JSON manifest.

    step-00001000-0.safetensors   rank 0: its rows of sharded tensors, and all replicated tensors
    step-00001000-1.safetensors   rank 1: its rows; only for sharded networks
    step-00001000.json            the manifest: step, digest, files with their SHA-256, shapes, rows, plain values

Nothing is pickled, so reading a checkpoint runs no code (torch.distributed.checkpoint pickles its metadata). It can be
loaded with any number of ranks in any layout: each reads the rows that it needs from the files that contain them.
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
    """`value` as a JSON tree; its tensors are added to `tensors` under their path in the tree.

    Supports mappings (keys: strings or integers), lists and tuples of tensors, numbers, strings, booleans and None.
    Raises ValueError for two tensors with the same path, TypeError for another type.
    """
    if isinstance(value, Tensor):
        if name in tensors:
            raise ValueError(f"the state has two tensors with the path {name}")
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
    """The inverse of `pack`; `read` returns the tensor with a given path."""
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
    """The part of a tensor that one rank writes."""

    tensor: Tensor
    rows: tuple[int, int] | None  # of the whole tensor; None where this is the whole


def pieces(tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
    """What this rank writes: its rows of sharded tensors; on rank 0 also all replicated tensors."""
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
    """Tensors on the host; asynchronous copies from a GPU are complete after `wait`."""

    pieces: dict[str, Piece]
    wait: Callable[[], None]


def hold(part: Mapping[str, Piece], *, copy: bool) -> Held:
    """The pieces on the host; with `copy` in memory of their own, so that training may continue.

    From a GPU they are copied asynchronously, in stream order, into pinned memory.
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
    """Writes a rank's pieces as safetensors."""
    save_file({name: piece.tensor for name, piece in part.items()}, path)


def describe_part(path: Path, part: Mapping[str, Piece]) -> dict[str, Any]:
    """The manifest's entry for a written file: name, SHA-256, size in bytes, and its rows of sharded tensors."""
    rows = {name: list(piece.rows) for name, piece in part.items() if piece.rows is not None}
    return {"file": path.name, "sha256": sha256(path), "bytes": path.stat().st_size, "rows": rows}


def layout_of(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """The shapes of the sharded tensors, whose rows are stored in several files."""
    return {name: list(tensor.shape) for name, tensor in tensors.items() if sharding.is_sharded(tensor)}


def seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with the SHA-256 of its own content as `seal`."""
    content = {key: value for key, value in manifest.items() if key != "seal"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return {**content, "seal": hashlib.sha256(text.encode()).hexdigest()}


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads the manifest in `path`. Raises UserError if it is missing or its checksum does not match."""
    manifest = read_json(path)
    if manifest.get("seal") != seal(manifest)["seal"]:
        raise UserError(f"{path}: damaged (its content does not match its checksum)")
    return manifest


def verify(folder: Path, files: list[dict[str, Any]]) -> None:
    """Checks the sizes of all files and the SHA-256 of this rank's share. Raises UserError naming the damaged one."""
    for number, entry in enumerate(files):
        path = folder / _plain(entry["file"])
        if not path.exists():
            raise UserError(f"{path}: missing, although the checkpoint's JSON exists")
        if path.stat().st_size != entry["bytes"]:
            raise UserError(f"{path}: damaged (its size differs from the one recorded)")
        mine = number % ranks.world_size() == ranks.rank() % ranks.world_size()
        if mine and sha256(path) != entry["sha256"]:
            raise UserError(f"{path}: damaged (its SHA-256 differs from the one recorded)")


def _plain(name: str) -> str:
    """`name`, which must be a plain file name. Raises UserError for a path (the file is next to its manifest)."""
    if os.path.basename(name) != name:
        raise UserError(f"{name}: not a file in the folder of the checkpoint's JSON")
    return name


class Reader:
    """Reads tensors from the files of one checkpoint."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]):
        self._shapes: dict[str, list[int]] = manifest["shapes"]
        self._files = [safe_open(folder / _plain(entry["file"]), framework="pt") for entry in manifest["files"]]
        self._rows = [entry["rows"] for entry in manifest["files"]]

    def read(self, name: str, like: Tensor | None = None) -> Tensor:
        """The tensor `name`: whole, or this rank's rows if `like`, the tensor it replaces, is sharded."""
        if like is None or not sharding.is_sharded(like):
            shape = self._shapes.get(name)
            return self._files[0].get_tensor(name) if shape is None else self._join(name, 0, shape[0])
        start, stop = sharding.rows(like)
        part = self._join(name, start, stop) if name in self._shapes else self._files[0].get_slice(name)[start:stop]
        return sharding.as_part_of(part.to(sharding.local(like).device), like)

    def _join(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor that is stored in several files."""
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
