"""Lists of prompts, and the stream of prompts that a generator is trained on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dmd2.config import Prompts
from dmd2.config.digit_pairs import prompts as digit_pairs
from dmd2.datasets import coco
from dmd2.datasets.loader import EpochStream
from dmd2.datasets.texts import tidy
from dmd2.errors import UserError
from dmd2.files import check_sha256
from dmd2.method.denoiser import Cond

log = logging.getLogger(__name__)


@cache
def load_prompts(prompts: Prompts) -> tuple[str, ...]:
    """The prompts of a list, in its order. Empty ones are left out and counted in the log.

    Raises UserError for a file that is missing, empty, of another kind or with another checksum, and for a list with
    another checksum.
    """
    found = _read(prompts)
    if prompts.list_sha256 is not None and (made := coco.digest(found)) != prompts.list_sha256:
        raise UserError(
            f"prompts: the list of {len(found)} from {prompts.path or prompts.source} has the SHA-256 {made}, but "
            f"list_sha256 is {prompts.list_sha256}; use the file that it was made from, or correct the key"
        )
    return found


def _read(prompts: Prompts) -> tuple[str, ...]:
    if prompts.source == "digit_pairs":
        return tuple(digit_pairs(prompts.subset))
    path = Path(str(prompts.path))
    if not path.is_file():
        raise UserError(f"prompts: {path} does not exist; put it there or correct the path")
    check_sha256(path, prompts.sha256)
    if prompts.source == "coco10k":
        drawn = tuple(tidy(row.caption) for row in coco.subset(coco.read_captions(path)))
        log.info("prompts: %s: the list of %d has the SHA-256 %s", path, len(drawn), coco.digest(drawn))
        return drawn
    read = _READERS.get(path.suffix)
    if read is None:
        raise UserError(f"prompts: {path}: unknown kind of file; use {', '.join(_READERS)}")
    found = read(path)
    kept = tuple(text for text in found if text)
    if not kept:
        raise UserError(f"prompts: {path} has no prompt; correct the path")
    if len(kept) < len(found):
        log.warning("prompts: %s: %d of %d are empty and left out", path, len(found) - len(kept), len(found))
    return kept


def _lines(path: Path) -> list[str]:
    """The lines of a text, which end with a line feed only: captions may contain other marks, such as U+2028."""
    try:
        return path.read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"prompts: {path} is not UTF-8 text ({error}); convert it") from None


def _read_text(path: Path) -> list[str]:
    return [tidy(line) for line in _lines(path)]


def _read_json_lines(path: Path) -> list[str]:
    found = []
    for number, line in enumerate(_lines(path), start=1):
        try:
            found.append(tidy(json.loads(line)["caption"]) if line.strip() else "")
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(
                f"prompts: {path}: line {number} must be a JSON object with a text under the key `caption`; correct it"
            ) from None
    return found


def _read_parquet(path: Path) -> list[str]:
    from pyarrow import ArrowException, parquet

    try:
        return [tidy(text) for text in parquet.read_table(path, columns=["caption"])["caption"].to_pylist()]
    except (ArrowException, KeyError, TypeError) as error:
        raise UserError(f"prompts: {path}: not a Parquet file with the text column `caption` ({error})") from None


_READERS: dict[str, Callable[[Path], list[str]]] = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
}


class PromptStream:
    """The prompts of one rank's batches: a function of (seed, step), as `datasets.loader.Loader` for samples."""

    def __init__(
        self,
        prompts: Sequence[str],
        tokenize: Callable[[Sequence[str]], Cond],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ):
        self._prompts, self._tokenize = prompts, tokenize
        self._batch_size, self._rank, self._world = batch_size, rank, world
        self._stream = EpochStream(len(prompts), seed)

    def __call__(self, step: int) -> tuple[Tensor, Cond]:
        """Numbers (B,) int64 and tokens of this rank's prompts in global batch `step`."""
        start = (step * self._world + self._rank) * self._batch_size
        ids = self._stream.ids(start, start + self._batch_size)
        return torch.from_numpy(ids), self._tokenize([self._prompts[i] for i in ids])
