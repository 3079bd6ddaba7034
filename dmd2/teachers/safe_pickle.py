"""Reads EDM's network pickles without executing anything in them.

An EDM pickle rebuilds its modules by running Python source that it carries. Here every global that the file names
becomes an inert record of the arguments it was given; a global outside a short list ends the reading. Afterwards the
records are walked and tensors are built from what they hold. The stream is read by Python's own unpickler, whose memo
is a dict: the C one allocates as much memory as a hostile index says. The values of tensors are files of `torch.save`
in the file, and torch's own restricted loader reads them.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from dmd2.errors import UserError
from dmd2.teachers.torch_file import load_tensors, reading

PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
STORAGE = "torch.storage._load_from_bytes"
TENSOR = "torch._utils._rebuild_tensor_v2"
PARAMETER = "torch._utils._rebuild_parameter"
KNOWN = frozenset(
    {
        PERSISTENT,
        STORAGE,
        TENSOR,
        PARAMETER,
        "collections.OrderedDict",
        "torch.nn.modules.container.ModuleDict",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "numpy.dtype",
        "builtins.set",
        "dnnlib.util.EasyDict",
    }
)
"""Globals of EDM's files. None is ever imported or called: each stands for an inert record."""


class _Record:
    """What a file said about one object: its global, the call's arguments, its state and its items."""

    __slots__ = ("args", "items", "state")
    args: tuple[Any, ...]
    items: dict[Any, Any]
    state: Any
    name = ""

    def __new__(cls, *args: Any) -> _Record:
        record = object.__new__(cls)
        record.args, record.state, record.items = args, None, {}
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value


KEYS = (str, int, float, bytes, type(None))
"""What may be a key: hashing tuples that lie in one another exhausts the stack."""


def _check_keys(keys: Iterable[Any]) -> None:
    for key in keys:
        if not isinstance(key, KEYS):
            raise pickle.UnpicklingError(f"a key of type {type(key).__name__}")


def _refuse(reader: Any) -> NoReturn:
    raise pickle.UnpicklingError("a buffer without data")


def _checked(load: Callable[[Any], None], keys: Callable[[list[Any]], list[Any]]) -> Callable[[Any], None]:
    """An opcode's action after the keys that it takes from the stack were checked."""

    def checked(reader: Any) -> None:
        _check_keys(keys(reader.stack))
        load(reader)

    return checked


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined,misc,unused-ignore]
    """Python's unpickler with every global replaced by a record class of this reading alone."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        **{code[0]: _refuse for code in (pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)},
        **{
            code[0]: _checked(pickle._Unpickler.dispatch[code[0]], keys)
            for code, keys in (
                (pickle.SETITEM, lambda stack: stack[-2:-1]),
                (pickle.SETITEMS, lambda stack: stack[::2]),
                (pickle.DICT, lambda stack: stack[::2]),
                (pickle.ADDITEMS, lambda stack: stack),
                (pickle.FROZENSET, lambda stack: stack),
            )
        },
    }

    def __init__(self, file: io.BufferedIOBase):
        super().__init__(file)
        self._classes: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> type:
        full = f"{module}.{name}"
        if full not in KNOWN:
            raise UserError(f"blocked global {full[:100]!r}: not part of EDM's format; get the file from its publisher")
        if full not in self._classes:
            self._classes[full] = type(full, (_Record,), {"__slots__": (), "name": full})
        return self._classes[full]

    def get_extension(self, code: int) -> NoReturn:
        raise pickle.UnpicklingError(f"extension code {code}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("persistent id")


def read_edm_pickle(path: Path | str) -> dict[str, Tensor]:
    """The parameters and buffers of the `ema` network in an EDM pickle, by their state-dict names.

    Raises UserError naming the file, and the blocked global if there is one.
    """
    path = Path(path)
    with reading(path, "a pickle in EDM's format"), path.open("rb") as file:
        return _network(_Unpickler(file).load(), path.stat().st_size)


def _network(content: Any, size: int) -> dict[str, Tensor]:
    """The state dict of content["ema"] in a file of `size` bytes."""
    if not isinstance(content, dict) or "ema" not in content:
        raise UserError("holds no `ema` network; EDM's published networks and snapshots do")
    return dict(_Tree(2 * size).tensors(content["ema"], ""))


class _Tree:
    """A walk over the modules of a network, each once, that makes at most `limit` bytes of tensors.

    So a file can neither fold its modules into each other nor multiply a storage by naming it often.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._seen: set[int] = set()
        self._storages: dict[int, Tensor] = {}

    def tensors(self, module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of a module and the modules in it, in the order of torch's state dict."""
        if id(module) in self._seen:
            raise ValueError(f"module {prefix!r} appears twice")
        self._seen.add(id(module))
        state = _state(module, prefix)
        for kind in ("_parameters", "_buffers"):
            for name, value in _mapping(state.get(kind, {})).items():
                if value is not None:
                    yield prefix + name, self._tensor(value, prefix + name)
        for name, value in _mapping(state.get("_modules", {})).items():
            if value is not None:
                yield from self.tensors(value, f"{prefix}{name}.")

    def _tensor(self, value: Any, name: str) -> Tensor:
        """The tensor that a record of torch's rebuilding calls describes, checked against its storage."""
        if isinstance(value, _Record) and value.name == PARAMETER:
            value = value.args[0]
        if not isinstance(value, _Record) or value.name != TENSOR:
            raise ValueError(f"{name!r} is not a tensor")
        storage, offset, size, stride = value.args[:4]
        used = id(storage) in self._storages
        if not used:
            self._storages[id(storage)] = _flat(storage, name)
            self._take(self._storages[id(storage)].nbytes)
        flat = self._storages[id(storage)]
        if math.prod(size) > len(flat):
            raise ValueError(f"{name!r} of shape {tuple(size)} exceeds its {len(flat)} stored values")
        view = flat.as_strided(size, stride, offset)
        if not used and view.is_contiguous() and len(flat) == view.numel():
            return view
        self._take(view.nbytes)
        return view.clone(memory_format=torch.contiguous_format)

    def _take(self, num_bytes: int) -> None:
        self._limit -= num_bytes
        if self._limit < 0:
            raise ValueError("its tensors are larger than the file")


def _state(module: Any, prefix: str) -> Mapping[Any, Any]:
    """The attributes of a module: EDM's persistent objects give them to their global, torch's own to BUILD."""
    if not isinstance(module, _Record):
        raise ValueError(f"{prefix or 'ema'!r} is {type(module).__name__}, not a module")
    if module.name == PERSISTENT:
        return _mapping(_mapping(module.args[0])["state"])
    return _mapping(module.state)


def _mapping(value: Any) -> Mapping[Any, Any]:
    if isinstance(value, _Record) and value.name == "collections.OrderedDict":
        return value.items
    if not isinstance(value, dict):
        raise ValueError(f"expected a mapping, found {type(value).__name__}")
    return value


def _flat(storage: Any, name: str) -> Tensor:
    """All values of a stored buffer, read by torch's own restricted loader."""
    if not isinstance(storage, _Record) or storage.name != STORAGE:
        raise ValueError(f"{name!r} has no storage")
    try:
        loaded = load_tensors(io.BytesIO(storage.args[0]))
    except UserError as error:
        raise UserError(f"{error} (in the storage of {name!r})") from None
    if not isinstance(loaded, torch.storage.TypedStorage):
        raise ValueError(f"the storage of {name!r} is {type(loaded).__name__}")
    return torch.tensor([], dtype=loaded.dtype).set_(loaded)
