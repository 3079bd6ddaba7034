"""Crash-safe checkpoints: atomic, checksummed, pruned, for one configuration and one writer.

A store is a folder outside all outputs of the workflow, named by the digest of everything that determines the weights.
A checkpoint exists once its manifest `step-00001000.json` does, which is written last (format: `checkpoint_format`).
`newest.json` records that a checkpoint was saved, so that lost ones are an error and not a silent restart.

Saving copies the state and returns; a thread writes it while training continues, at most one checkpoint at a time.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dmd2.errors import UserError
from dmd2.files import atomic, read_json, take_lock, write_json
from dmd2.training import checkpoint_format, ranks
from dmd2.training.background import Background
from dmd2.training.checkpoint_format import (
    Held,
    Reader,
    describe_part,
    hold,
    layout_of,
    pack,
    pieces,
    read_manifest,
    seal,
    unpack,
    verify,
)

Warn = Any
"""A logger with a `warning` method."""
DAMAGES = (UserError, OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)
"""Exceptions that reading a damaged checkpoint may raise."""
GOOD, DAMAGED, FOREIGN = 0, 1, 2
POLL_S = 0.02


class CheckpointStore:
    """The state folder of one training run; a context manager that holds its lock.

    The lock is the operating system's, so it is released however the process ends; a second process gets a UserError
    naming the holder. Rank 0 holds it for all ranks. `save`, `load` and `wait` are collective. Rank 0 writes a
    replicated state; each rank writes its rows of a sharded one, and rank 0 the manifest once all files are written,
    for which it waits at most `patience_minutes`.
    """

    def __init__(
        self,
        folder: Path | str,
        digest: str,
        *,
        keep: int = 2,
        warn: Warn = None,
        in_background: bool = False,
        patience_minutes: float = 10.0,
    ):
        self.folder = Path(folder)
        self.digest = digest
        self._keep = keep
        self._warn = warn
        self._lock = FileLock(self.folder / "lock")
        self._in_background = in_background
        self._work = Background(enabled=in_background)
        self._patience_s = 60 * patience_minutes

    def __enter__(self) -> Self:
        if ranks.rank() > 0:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            take_lock(self._lock)
        except Timeout:
            raise UserError(f"{self.folder}: in use by {self._owner()}; wait for it or stop it") from None
        me = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID"), "since": _now()}
        write_json(self.folder / "owner.json", me)
        self._remove_unfinished()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._work.end()
            self._lock.release()

    def _remove_unfinished(self) -> None:
        """Removes temporary files of a killed process, and files of checkpoints without a manifest."""
        finished = {f"step-{step:08d}" for step in self._steps()}
        for path in [*self.folder.glob(".*.tmp"), *self.folder.glob("*.part"), *self.folder.glob("step-*.safetensors")]:
            if path.suffix != ".safetensors" or path.stem.rpartition("-")[0] not in finished:
                path.unlink()

    def _owner(self) -> str:
        try:
            owner = json.loads((self.folder / "owner.json").read_text())
        except (OSError, json.JSONDecodeError):
            return "another process"
        job = f", job {owner['job']}" if owner.get("job") else ""
        return f"process {owner.get('pid')} on {owner.get('host')}{job} since {owner.get('since')}"

    def save(self, step: int, state: Mapping[str, Any], **facts: Any) -> None:
        """Copies the state after `step` iterations and writes its checkpoint in the background.

        Blocks until the previous checkpoint is written. Once this one is complete, all but the newest `keep` are
        removed. An error in writing is raised by the next call of `save`, `check` or `wait`.
        """
        self.wait()
        tensors: dict[str, Tensor] = {}
        tree, shapes = pack(state, "", tensors), layout_of(tensors)
        part = pieces(tensors)
        if not part and not shapes:
            return
        held = hold(part, copy=self._in_background)
        manifest = {"step": step, "digest": self.digest, **facts, "state": tree, "shapes": shapes}
        self._work.do(lambda: self._write(step, held, manifest, bool(shapes)))

    def _write(self, step: int, held: Held, manifest: dict[str, Any], sharded: bool) -> None:
        """Writes this rank's file and, on rank 0, the manifest once all ranks' files are written."""
        held.wait()
        path = self._part(step, ranks.rank())
        _write(path, lambda temporary: checkpoint_format.write_part(temporary, held.pieces))
        entry = describe_part(path, held.pieces)
        if ranks.rank() > 0:
            write_json(path.with_suffix(".part"), entry)
            return
        others = range(1, ranks.world_size()) if sharded else range(0)
        entries = [self._await_part(step, rank) for rank in others]
        write_json(self._manifest(step), seal({**manifest, "files": [entry, *entries]}))
        write_json(self.folder / "newest.json", {"step": step})
        for rank in others:
            self._part(step, rank).with_suffix(".part").unlink()
        steps = self._steps()
        passed_over = [old for old in steps if old > step]  # damaged, else `load` would have returned them
        for old in [*passed_over, *[old for old in steps if old <= step][: -self._keep]]:
            self._manifest(old).unlink()
            for file in self.folder.glob(f"{self._manifest(old).stem}-*.safetensors"):
                file.unlink()

    def _await_part(self, step: int, rank: int) -> dict[str, Any]:
        """The manifest's entry for another rank's file, once written. Raises UserError after `patience_minutes`."""
        path, end = self._part(step, rank).with_suffix(".part"), time.monotonic() + self._patience_s
        while not path.exists():
            if self._work.given_up.is_set() or time.monotonic() > end:
                raise UserError(
                    f"{path.with_suffix('.safetensors')}: rank {rank} has not written its part of the checkpoint; "
                    f"its own message says why. Run the same command again: earlier checkpoints are kept"
                )
            time.sleep(POLL_S)
        return read_json(path)

    def check(self) -> None:
        """Raises an error of a write that has finished; does not block."""
        self._work.check()

    def wait(self) -> None:
        """Blocks until everything that this rank saved is on disk; raises errors of the writes."""
        self._work.wait()

    def load(self, like: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The newest valid checkpoint as (state, manifest), or None if the folder never had one.

        Tensors are whole and on the CPU, or this rank's rows where the tensor in `like`, a state of the same structure,
        is sharded. The number of ranks and the layout at saving do not matter.

        Skips damaged checkpoints with a warning; all ranks load the same one. Raises UserError if all are damaged or
        one belongs to another configuration: a run never restarts from scratch silently.
        """
        self.wait()
        places: dict[str, Tensor] = {}
        pack(like or {}, "", places)
        for step in self._agreed_steps():
            found, verdict, error = None, GOOD, None
            try:
                found = self._read(step, places)
            except DAMAGES as caught:
                error, verdict = caught, FOREIGN if isinstance(caught, ForeignCheckpoint) else DAMAGED
            worst = ranks.agree([verdict])[0]
            if worst == GOOD:
                return found
            if worst == FOREIGN:
                raise error if isinstance(error, ForeignCheckpoint) else self._foreign(step, "another configuration")
            if error is not None or ranks.rank() == 0:
                named = f"{self._manifest(step)}: damaged ({error!r})" if error else f"{self._manifest(step)}: damaged"
                problem = error if isinstance(error, UserError) else named
                self._note(f"{problem}; falling back to the previous checkpoint")
        if ranks.agree([(self.folder / "newest.json").exists()])[0]:
            raise UserError(
                f"{self.folder}: its checkpoints are missing or damaged; "
                f"restore one, or delete the folder to start over"
            )
        return None

    def _agreed_steps(self) -> list[int]:
        """The steps of the checkpoints that any rank finds, newest first; the same list on all ranks."""
        steps: list[int] = []
        mine = self._steps()
        while (newest := ranks.agree([max((s for s in mine if not steps or s < steps[-1]), default=-1)])[0]) >= 0:
            steps.append(newest)
        return steps

    def _read(self, step: int, places: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
        facts = read_manifest(self._manifest(step))
        if facts.get("digest") != self.digest:
            raise self._foreign(step, f"configuration {facts.get('digest')}")
        verify(self.folder, facts["files"])
        reader = Reader(self.folder, facts)
        return unpack(facts["state"], lambda name: reader.read(name, places.get(name))), facts

    def _foreign(self, step: int, found: str) -> ForeignCheckpoint:
        return ForeignCheckpoint(
            f"{self._manifest(step)}: written under {found}, not {self.digest}; "
            f"move the folder away or restore the configuration"
        )

    def save_weights(self, name: str, weights: Mapping[str, Tensor]) -> Path:
        """Writes `name`.safetensors to the folder in the background; returns its path.

        Files appear in the order of the calls, so a run killed before the next checkpoint writes both again.
        """
        path = self.folder / f"{name}.safetensors"
        held = hold({key: checkpoint_format.Piece(value, None) for key, value in weights.items()}, copy=True)

        def write() -> None:
            held.wait()
            save_weights(path, {key: piece.tensor for key, piece in held.pieces.items()})

        self._work.do(write)
        return path

    def clear(self) -> None:
        """Removes the folder, lock file included, after its results were published.

        `newest.json` is removed first: an interrupted removal does not make the next run fail.
        """
        (self.folder / "newest.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _steps(self) -> list[int]:
        return sorted(int(p.stem.removeprefix("step-")) for p in self.folder.glob("step-*.json"))

    def _manifest(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.json"

    def _part(self, step: int, rank: int) -> Path:
        return self.folder / f"step-{step:08d}-{rank}.safetensors"

    def _note(self, message: str) -> None:
        if self._warn is not None:
            self._warn.warning(message)


class ForeignCheckpoint(UserError):
    """A checkpoint was written under another configuration."""


def save_weights(path: Path | str, weights: Mapping[str, torch.Tensor]) -> None:
    """Writes a state dict as safetensors, atomically. Raises UserError if it cannot be written (disk full)."""
    state = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    _write(Path(path), lambda temporary: save_file(state, temporary))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file atomically. Raises UserError if the disk is full, for any of the exceptions that report it."""
    try:
        with atomic(path) as temporary:
            write(temporary)
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(path.parent).free / 2**20
        raise UserError(
            f"{path}: could not be written, {free:.0f} MiB are free ({str(error).splitlines()[0]}); "
            f"free space and run the same command: earlier checkpoints are kept"
        ) from error


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
