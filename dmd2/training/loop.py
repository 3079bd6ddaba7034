"""The training loop: resume, log, checkpoint, export, stop on a signal.

A `Trainee` knows nothing of files; the loop knows nothing of losses.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

from torch import Tensor

from dmd2.config import Runtime
from dmd2.errors import Interrupted
from dmd2.progress import Progress
from dmd2.training import ranks, sharding
from dmd2.training.checkpoint_store import CheckpointStore
from dmd2.training.energy import Meter, gpu_meter
from dmd2.training.log import TrainLog
from dmd2.training.optimizer import FiniteGuard

log = logging.getLogger(__name__)


class Trainee(Protocol):
    """What `fit` trains: see `method.distillation.Distillation` and `method.teacher_fit.TeacherFit`."""

    guard: FiniteGuard

    def step(self, index: int) -> dict[str, Tensor]: ...
    def export(self) -> dict[str, Tensor]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class StopSignals:
    """A context in which stop signals are recorded in `received`; a second SIGINT ends the process.

    A SIGHUP (a closed terminal) is one, unless it is ignored, as under nohup.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> Self:
        heeded = [s for s in self.SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
        self._old = {s: signal.signal(s, self._note) for s in heeded}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for s, handler in self._old.items():
            signal.signal(s, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.received == signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signum


class Clock:
    """Wall-clock and CPU seconds, and the GPU's joules where `meter` knows them, including those of earlier attempts.

    `energy_j` are those of earlier attempts; None where one of them did not know, and then nobody does.
    """

    def __init__(
        self, wall_s: float = 0.0, cpu_s: float = 0.0, energy_j: float | None = 0.0, meter: Meter | None = None
    ):
        self._wall, self._cpu = time.monotonic() - wall_s, time.process_time() - cpu_s
        self._meter = meter or gpu_meter()
        now = self._meter()
        self._energy = None if now is None or energy_j is None else now - energy_j

    def read(self) -> dict[str, float]:
        """Seconds so far, and joules as `energy_j` where they are known."""
        wall, cpu = time.monotonic() - self._wall, time.process_time() - self._cpu
        known = {"wall_s": round(wall, 3), "cpu_s": round(cpu, 3)}
        now = None if self._energy is None else self._meter()
        return known if now is None or self._energy is None else {**known, "energy_j": round(now - self._energy, 1)}


def fit(
    trainee: Trainee,
    iterations: int,
    store: CheckpointStore,
    runtime: Runtime,
    *,
    title: str,
    snapshots: Iterable[int] = (),
    averages: Callable[[], Mapping[str, Mapping[str, Tensor]]] = dict,
    alarm: Callable[[dict[str, float]], str | None] | None = None,
) -> dict[str, float]:
    """Trains up to `iterations`, from the newest checkpoint of `store` if there is one; returns `Clock.read()`.

    The store must be entered (locked). Snapshots of `trainee.export()` are written to its folder as
    `snapshot-00000500.safetensors`, and `averages()` beside them, with their keys after the number. `alarm` gets each
    log row and may return a warning. Raises UserError if a loss is not finite, and Interrupted after saving on a
    signal: with one process after the current iteration, with several after the next one (`ranks.AsyncFlags` is
    asynchronous). Two iterations and the writing must fit into the grace period of a cluster (Slurm: 30 s); otherwise
    it is a crash, which loses at most the work since the newest checkpoint: `runtime.checkpoint_every` iterations or
    `checkpoint_minutes`, and what ran while it was being written.
    """
    start, clock = _take_up(trainee, store)
    if start:
        log.info("%s: resuming after iteration %d of %d", title, start, iterations)
    snapshots = set(snapshots)
    is_main = ranks.rank() == 0
    saved_at, num_saved, notices = time.monotonic(), 0, ranks.AsyncFlags()

    with StopSignals() as stop, TrainLog(store.folder, start, enabled=is_main) as rows:
        progress = Progress(title, iterations, start)
        for index in range(start, iterations):
            with ranks.exchange(f"iteration {index + 1}"):
                rows.add(trainee.step(index))
            store.check()
            done = index + 1
            is_time = time.monotonic() - saved_at > 60 * runtime.checkpoint_minutes
            # A rank whose time is up requests the next checkpoint by its number: two requests make one checkpoint.
            signum, wanted = notices(stop.received or 0, num_saved + is_time, now=done == iterations)
            saving = done % runtime.checkpoint_every == 0 or wanted > num_saved or signum > 0 or done == iterations
            if done % runtime.log_every == 0 or done in snapshots or saving:
                trainee.guard.raise_if_tripped()
                row = rows.flush(done, clock.read())
                progress.update(done, row.get("denoising_loss"))
                if is_main and alarm is not None and (warning := alarm(row)):
                    log.warning("%s: iteration %d: %s", title, done, warning)
            if done in snapshots:
                for suffix, state in {"": trainee.export(), **averages()}.items():
                    if weights := sharding.gather(state):  # on the first rank
                        store.save_weights(f"snapshot-{done:08d}{suffix}", weights)
            if saving:
                store.save(done, trainee.state_dict(), **clock.read())
                saved_at, num_saved = time.monotonic(), num_saved + 1
            if signum:
                store.wait()
                ranks.barrier()  # else the launcher terminates the others when the first ends
                raise Interrupted(signum, done)
        store.wait()
    ranks.barrier()
    return clock.read()


def _take_up(trainee: Trainee, store: CheckpointStore) -> tuple[int, Clock]:
    """Loads the newest checkpoint into the trainee; returns the number of finished iterations and their clock."""
    found = store.load(trainee.state_dict())
    if found is None:
        return 0, Clock()
    state, facts = found
    trainee.load_state_dict(state)
    return facts["step"], Clock(facts["wall_s"], facts["cpu_s"], facts.get("energy_j"))
