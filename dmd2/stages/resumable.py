"""Intermediate files of a job that are divided among its processes and survive a kill.

Each process writes every world-th file that does not exist yet, and ends; rank 0 waits for the others' files. There is
no collective call, so ranks may be hours apart, and finished files are kept when the number of processes changes. A
file's content is a function of its name and the folder's name, so two jobs in one folder write the same content.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dmd2.config import Runtime
from dmd2.errors import UserError
from dmd2.lineage.spec import Spec
from dmd2.training import ranks

log = logging.getLogger(__name__)
SLOW_BATCH_MINUTES = 60.0
"""A process reports that it is alive once per batch, and a batch of a teacher's 511 passes may take many minutes."""
POLL_S = 0.2


def patience(runtime: Runtime) -> float:
    """Minutes without a heartbeat after which a sampling process counts as hung."""
    return max(runtime.collective_timeout_minutes, SLOW_BATCH_MINUTES)


class ResumableFiles:
    """The files `names` of one job, of which this process writes its share."""

    def __init__(self, state: Path, spec: Spec, contents: Sequence[str], names: Sequence[str]) -> None:
        """`contents` are the checksums of all inputs; together with the spec they determine the folder's name."""
        key = hashlib.sha256("\n".join([spec.digest, *contents]).encode()).hexdigest()[:16]
        self.folder = state / f"{spec.stage}-{spec.name.replace('/', '-')}-{key}"
        self.paths = [self.folder / name for name in names]
        self._alive = self.folder / f"rank-{ranks.rank()}.alive"

    def mine(self, is_whole: Callable[[Path], object]) -> Iterator[tuple[int, Path]]:
        """Yields number and path of each file that this process must write; `is_whole` raises UserError if damaged."""
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = 0
        for number in range(ranks.rank(), len(self.paths), ranks.world_size()):
            self.beat()
            path = self.paths[number]
            try:
                if path.exists():
                    is_whole(path)
                    kept += 1
                    continue
            except UserError as error:
                log.warning("%s; it is written again", error)
            if kept:
                log.info("%s: resuming with %d finished files of an interrupted job", self.folder.name, kept)
                kept = 0
            yield number, path

    def beat(self) -> None:
        """Heartbeat for rank 0's `wait`; call it at least every few minutes."""
        self._alive.touch()

    def wait(self, timeout_minutes: float, is_whole: Callable[[Path], object] = Path.exists) -> None:
        """Blocks rank 0 until the files of all ranks exist and pass `is_whole`.

        Raises UserError if a file is missing and its rank had no heartbeat for `timeout_minutes`.
        """

        def is_there(path: Path) -> bool:
            try:
                return path.exists() and is_whole(path) is not False
            except UserError:
                return False

        seen: dict[Path, tuple[float, float]] = {}  # heartbeat, and this process's time when it was first seen
        world = ranks.world_size()
        for number, path in enumerate(self.paths):
            alive = self.folder / f"rank-{number % world}.alive"
            while not is_there(path):
                beat = alive.stat().st_mtime if alive.exists() else 0.0
                if seen.get(alive, (-1.0, 0.0))[0] != beat:
                    seen[alive] = beat, time.monotonic()
                elif time.monotonic() - seen[alive][1] > 60 * timeout_minutes:
                    raise UserError(
                        f"{path}: rank {number % world} had no heartbeat for {timeout_minutes:g} minutes "
                        f"(runtime.collective_timeout_minutes); see its log, and run the same command: finished "
                        f"files are kept"
                    )
                time.sleep(POLL_S)

    def clear(self) -> None:
        """Removes the folder after its results were published."""
        shutil.rmtree(self.folder, ignore_errors=True)
