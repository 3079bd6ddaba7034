"""Progress of a long stage as log lines (done, rate, remaining time), readable in a file and on a terminal."""

from __future__ import annotations

import logging
import time

from tqdm import tqdm

log = logging.getLogger(__name__)


class Progress:
    """Logs a line at most every `interval_s` seconds and one at the end."""

    def __init__(
        self,
        title: str,
        total: int | None,
        done: int = 0,
        *,
        interval_s: float = 5.0,
        unit: str = "it",
        scale: bool = False,
    ):
        self._title, self._total, self._initial, self._interval = title, total, done, interval_s
        self._unit, self._scale = unit, scale
        self._started = self._written = time.monotonic()

    def update(self, done: int, loss: float | None = None) -> None:
        """Reports that `done` of the total are finished, with the loss if given."""
        now = time.monotonic()
        if done != self._total and now - self._written < self._interval:
            return
        self._written = now
        line = tqdm.format_meter(
            done,
            self._total,  # type: ignore[arg-type]  # None: no total
            now - self._started,
            ncols=0,
            prefix=self._title,
            initial=self._initial,
            unit=self._unit,
            unit_scale=self._scale,
            postfix=None if loss is None else f"loss {loss:.4g}",
        )
        log.info("%s", line)

    def update_total(self, done: int, total: int | None) -> None:
        """`update` for a total that becomes known later."""
        if self._total is None and total is not None:
            self._total, self._initial = total, done
        self.update(done)


class Counter:
    """A `Progress` updated by increments; without a total it shows count and rate."""

    def __init__(self, title: str, total: int | None = None):
        self._done = 0
        self._progress = Progress(title, total)

    def __call__(self, num: int) -> None:
        """Reports that `num` more are done."""
        self._done += num
        self._progress.update(self._done)
