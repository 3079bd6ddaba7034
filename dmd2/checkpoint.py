"""Checkpoints that cannot hurt: atomic, checksummed, pruned, tied to one configuration and one writer.

A store is a folder outside every declared output of the workflow, named by the digest of all that decides the weights.
A checkpoint is a pair `step-00001000.pt` and `step-00001000.json`; it exists once the JSON does, which is written last.
`newest.json` remembers that there was one, so that lost checkpoints are an error and not a silent restart.
"""

from __future__ import annotations

import json
import os
import pickle
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

from dmd2 import distributed
from dmd2.errors import UserError
from dmd2.records import atomic, read_json, sha256, write_json

Warn = Any
"""A logger with a `warning` method."""


class CheckpointStore:
    """The state folder of one training run; a context manager that holds its lease.

    The lease is an operating-system lock, so it ends with the process however that dies. A second process gets a
    UserError naming the holder. Of several ranks the first alone writes, and holds the lease for all.
    """

    def __init__(self, folder: Path | str, digest: str, *, keep: int = 2, warn: Warn = None):
        self.folder = Path(folder)
        self.digest = digest
        self._keep = keep
        self._warn = warn
        self._lock = FileLock(self.folder / "lock")

    def __enter__(self) -> Self:
        if distributed.rank() > 0:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{self.folder}: in use by {self._owner()}; wait for it or stop it") from None
        me = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID"), "since": _now()}
        write_json(self.folder / "owner.json", me)
        for cut_off in self.folder.glob(".*.tmp"):  # what a killed process was writing
            cut_off.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def _owner(self) -> str:
        try:
            owner = json.loads((self.folder / "owner.json").read_text())
        except (OSError, json.JSONDecodeError):
            return "another process"
        job = f", job {owner['job']}" if owner.get("job") else ""
        return f"process {owner.get('pid')} on {owner.get('host')}{job} since {owner.get('since')}"

    def save(self, step: int, state: Mapping[str, Any], **facts: Any) -> None:
        """Writes the checkpoint after `step` iterations, then removes all but the newest `keep`."""
        path = self._path(step)
        _write(path, lambda temporary: torch.save(dict(state), temporary))
        content = {"step": step, "digest": self.digest, "sha256": sha256(path), "bytes": path.stat().st_size, **facts}
        write_json(path.with_suffix(".json"), content)
        write_json(self.folder / "newest.json", {"step": step})
        for old in self._steps()[: -self._keep]:
            self._path(old).with_suffix(".json").unlink()
            self._path(old).unlink(missing_ok=True)

    def load(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The newest good checkpoint as (state, its JSON), or None in a folder that never had one.

        A damaged checkpoint is passed over with a warning. Raises UserError if every one is damaged, or if one was
        written under another configuration: a run never restarts from nothing unasked.
        """
        for step in reversed(self._steps()):
            path = self._path(step)
            try:
                return self._read(path)
            except (UserError, OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
                if isinstance(error, ForeignCheckpoint):
                    raise
                self._note(f"{error}; falling back to the checkpoint before")
        if (self.folder / "newest.json").exists():
            raise UserError(
                f"{self.folder}: its checkpoints are missing or damaged; "
                f"restore one, or delete the folder to start anew"
            )
        return None

    def _read(self, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        facts = read_json(path.with_suffix(".json"))
        if facts.get("digest") != self.digest:
            raise ForeignCheckpoint(
                f"{path}: written under configuration {facts.get('digest')}, not {self.digest}; "
                f"move the folder away or restore the configuration"
            )
        if not path.exists():
            raise UserError(f"{path}: missing, though its JSON exists")
        if sha256(path) != facts.get("sha256"):
            raise UserError(f"{path}: damaged (its SHA-256 differs from the one recorded)")
        return torch.load(path, map_location="cpu", weights_only=True), facts

    def save_weights(self, name: str, weights: Mapping[str, torch.Tensor]) -> Path:
        """Writes weights as `name`.safetensors in the folder and returns its path."""
        path = self.folder / f"{name}.safetensors"
        save_weights(path, weights)
        return path

    def clear(self) -> None:
        """Removes the folder's content after its results were published; the lock file goes with it.

        The mark of earlier checkpoints goes first: a removal that is cut off leaves nothing that stops the next run.
        """
        (self.folder / "newest.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _steps(self) -> list[int]:
        return sorted(int(p.stem.removeprefix("step-")) for p in self.folder.glob("step-*.json"))

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.pt"

    def _note(self, message: str) -> None:
        if self._warn is not None:
            self._warn.warning(message)


class ForeignCheckpoint(UserError):
    """A checkpoint of another configuration."""


def save_weights(path: Path | str, weights: Mapping[str, torch.Tensor]) -> None:
    """Writes a state dict as safetensors, atomically. Raises UserError when the disk is full."""
    state = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    _write(Path(path), lambda temporary: save_file(state, temporary))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file atomically; torch and safetensors report a full disk in ways of their own."""
    try:
        with atomic(path) as temporary:
            write(temporary)
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(path.parent).free / 2**20
        raise UserError(
            f"{path}: could not be written, {free:.0f} MiB are free ({str(error).splitlines()[0]}); "
            f"free space and run the same command: what was saved before is kept"
        ) from error


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
