"""Loads weight files; names and shapes are checked against the network before anything is copied."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dmd2.errors import UserError
from dmd2.files import read_json, sha256
from dmd2.teachers.safe_pickle import read_edm_pickle
from dmd2.teachers.torch_file import read_torch_file

SHOWN = 3  # names in an error
WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes of data-parallel wrappers and of torch.compile."""
AVERAGED = "n_averaged"
INNER = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Parts that wrappers of inner modules leave in names."""
SINGLE = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")
"""Names of the one weight file in a folder: accelerate and transformers, diffusers, older ones."""
INDEX = (".safetensors.index.json", ".bin.index.json")
STAND_INS = (
    (
        b"version https://git-lfs",
        "a pointer of Git LFS, not the weights; run `git lfs pull`, or fetch the file itself",
    ),
    (b"/annex/objects/", "a pointer of git-annex, not the weights; run `git annex get`, or fetch the file itself"),
    *(
        (sign, "a web page, not weights: the download was refused or redirected; fetch the file itself")
        for sign in (b"<!doctype html", b"<html", b"<?xml", b"<head", b"<!--")
    ),
    (b"{", "a JSON text, not weights: the download was refused; fetch the file itself"),
)
"""How what is found in place of weights begins, in small letters, and what it is."""
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

    A folder is read as accelerate and transformers write one: `model.safetensors`, or the shards that an
    `*.safetensors.index.json` lists, which may also be named itself. Prefixes that wrappers leave on all names
    (`module.`, `_orig_mod.`) are dropped. Nothing in the file is executed. Raises UserError naming the file if it
    cannot be read.
    """
    path = weight_file(Path(path))
    if path.name.endswith(INDEX):
        return without_wrappers(_read_shards(path))
    if path.suffix in READERS:
        refuse_stand_in(path)
        return without_wrappers(READERS[path.suffix](path))
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: unknown kind of weight file; use .safetensors, torch's .bin, or EDM's .pkl")
    return without_wrappers(_read_safetensors(path))


def weight_file(path: Path) -> Path:
    """The file to read of a path: itself, or that of a folder. Raises UserError if there is none."""
    if path.is_dir():
        found = [path / name for name in SINGLE if (path / name).is_file()] or [
            index for end in INDEX for index in sorted(path.glob(f"[!.]*{end}"))
        ]
        if not found:
            raise UserError(
                f"{path}: no {', '.join(SINGLE)} or *{INDEX[0]} in this folder; name the weight file itself"
            )
        return found[0]
    if not path.is_file():
        raise UserError(f"{path}: no such weight file; put it there or correct the configured path")
    return path


def without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without what wrappers leave in names.

    That is `module.` and `_orig_mod.` before all of them, `_orig_mod.` and FSDP's parts anywhere, and the count
    `n_averaged` of an averaged model, whose other names all begin with `module.`.
    """
    if AVERAGED in state and all(name.startswith(WRAPPERS[0]) for name in state if name != AVERAGED):
        state = {name: value for name, value in state.items() if name != AVERAGED}
    found = {_unwrapped(name): value for name, value in state.items()}
    if len(found) != len(state):  # a compiled module beside the plain one
        found = dict(state)
    while prefix := next((p for p in WRAPPERS if found and all(name.startswith(p) for name in found)), None):
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def _unwrapped(name: str) -> str:
    for part in INNER:
        name = name.replace(f".{part}", ".").removeprefix(part)
    return name


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    refuse_stand_in(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); fetch or export it again") from None


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all shards that an index lists. Raises UserError if one is missing or has not what it should."""
    shards, listed = _shards(index)
    state: dict[str, Tensor] = {}
    for shard in map(weight_file, shards):
        state |= read_torch_file(shard) if shard.suffix == ".bin" else _read_safetensors(shard)
    if missing := sorted(listed.keys() - state.keys()):
        raise UserError(f"{index}: {_few('tensors that are in no shard', missing)}; fetch the shards again")
    return state


def _shards(index: Path) -> tuple[list[Path], dict[str, str]]:
    """The shards that an index names, sorted, and its table of tensors. Raises UserError for one in another folder."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"{index}: no `weight_map`; fetch it again")
    names = sorted(set(map(str, listed.values())))
    for name in names:
        if name in ("", ".", "..") or Path(name).name != name:
            raise UserError(f"{index}: the shard {name!r} is not in the index's folder; fetch it again")
    return [index.with_name(name) for name in names], listed


def digest_of(path: Path) -> str:
    """The SHA-256 of a weight file; of an index, that of the lines which sha256sum prints for its shards, sorted."""
    if not path.name.endswith(INDEX):
        return sha256(path)
    lines = [f"{sha256(weight_file(shard))}  {shard.name}\n" for shard in _shards(path)[0]]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def refuse_stand_in(path: Path) -> None:
    """Raises UserError for what a failed download leaves in place of weights: a page, a pointer, an error, nothing."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise UserError(f"{path}: an empty file, not weights; fetch it again")
    if b"\0" in start:  # no text; the length that a safetensors file begins with may look like the start of one
        return
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if said := next((what for sign, what in STAND_INS if start.startswith(sign)), None):
        raise UserError(f"{path}: {said}")


def read_network(path: Path | str, expected: Mapping[str, Tensor], *, prefix: str = "") -> dict[str, Tensor]:
    """Reads the tensors of the state dict `expected` from a weight file, in its order and dtypes.

    `expected` may have meta tensors. `prefix` selects one of several networks in the file. Raises UserError if a name
    or shape differs, or if a value is not finite.
    """
    state = {k.removeprefix(prefix): v for k, v in read_weights(path).items() if k.startswith(prefix)}
    return fitted(state, expected, f"{path}: {prefix}*" if prefix else str(path))


def fitted(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors of a state dict in the order and dtypes of `expected`. Raises UserError as `read_network` does."""
    check_state(state, expected, where)
    bad = [name for name, value in state.items() if not torch.isfinite(value).all()]
    if bad:
        raise UserError(f"{where}: {_few('containing NaN or infinity', bad)}; download it again")
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
