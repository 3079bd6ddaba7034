"""Files that several processes make a share of each, in a folder of the state that outlives a killed job.

Every process makes every world-th file, passes over those that are there, and ends; the first waits for the others'
files. That takes no collective call, so ranks may be hours apart, and what a killed job has finished is kept whatever
the number of processes before and after. A file is a function of its name and of what the folder is named by: two jobs
at work in one folder write the same twice, and harm nothing.
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
"""A process says that it is alive once a batch, and a batch of a teacher's 511 passes may take many minutes."""
POLL_S = 0.2


def patience(runtime: Runtime) -> float:
    """Minutes after which a process that makes samples and says nothing counts as hung."""
    return max(runtime.collective_timeout_minutes, SLOW_BATCH_MINUTES)


class ResumableFiles:
    """The files `names` of one job, of which this process makes its share."""

    def __init__(self, state: Path, spec: Spec, contents: Sequence[str], names: Sequence[str]) -> None:
        """`contents` are the checksums of what is read besides the spec: with it they name the folder."""
        key = hashlib.sha256("\n".join([spec.digest, *contents]).encode()).hexdigest()[:16]
        self.folder = state / f"{spec.stage}-{spec.name.replace('/', '-')}-{key}"
        self.paths = [self.folder / name for name in names]
        self._alive = self.folder / f"rank-{ranks.rank()}.alive"

    def mine(self, is_whole: Callable[[Path], object]) -> Iterator[tuple[int, Path]]:
        """Number and path of the files that this process has to make; `is_whole` raises UserError for a damaged one."""
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
                log.warning("%s; it is made again", error)
            if kept:
                log.info("%s: %d parts of a job that ended early are kept", self.folder.name, kept)
                kept = 0
            yield number, path

    def beat(self) -> None:
        """Tells the first process that this one is alive; to be called every few minutes at least."""
        self._alive.touch()

    def wait(self, timeout_minutes: float, is_whole: Callable[[Path], object] = Path.exists) -> None:
        """Waits, on the first process, for the files of the others; one that `is_whole` raises for is made again.

        Raises UserError if a file is missing and the process that makes it has not moved for `timeout_minutes`.
        """

        def is_there(path: Path) -> bool:
            try:
                return path.exists() and is_whole(path) is not False
            except UserError:
                return False

        seen: dict[Path, tuple[float, float]] = {}  # beat, and when it was first seen by this process's clock
        world = ranks.world_size()
        for number, path in enumerate(self.paths):
            alive = self.folder / f"rank-{number % world}.alive"
            while not is_there(path):
                beat = alive.stat().st_mtime if alive.exists() else 0.0
                if seen.get(alive, (-1.0, 0.0))[0] != beat:
                    seen[alive] = beat, time.monotonic()
                elif time.monotonic() - seen[alive][1] > 60 * timeout_minutes:
                    raise UserError(
                        f"{path}: rank {number % world} has not moved for {timeout_minutes:g} minutes "
                        f"(runtime.collective_timeout_minutes); see its log, and run the same command: what is "
                        f"finished is kept"
                    )
                time.sleep(POLL_S)

    def clear(self) -> None:
        """Removes the folder, after its results were published."""
        shutil.rmtree(self.folder, ignore_errors=True)
