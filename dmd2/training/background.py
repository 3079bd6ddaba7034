"""A single background thread whose exceptions are raised in the main thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event


class Background:
    """Runs calls in submission order in one thread, or synchronously if not `enabled`."""

    def __init__(self, *, enabled: bool = True):
        self._enabled = enabled
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="background")  # starts its thread when first used
        self._open: list[Future[None]] = []
        self.given_up = Event()
        """Set by `end`: pending calls should stop waiting and return or raise."""

    def do(self, call: Callable[[], None]) -> None:
        """Submits `call`, or runs it if not `enabled`. The caller must not modify what it reads until `wait`."""
        if self._enabled:
            self._open.append(self._thread.submit(call))
        else:
            call()

    def check(self) -> None:
        """Raises the first exception of the calls that have finished; does not block."""
        ended = [work for work in self._open if work.done()]
        self._open = [work for work in self._open if not work.done()]
        for work in ended:
            work.result()

    def wait(self) -> None:
        """Blocks until all calls have finished; raises the first exception."""
        work, self._open = self._open, []
        for each in work:
            each.result()

    def end(self) -> None:
        """Sets `given_up`, blocks until all calls have finished and drops their exceptions."""
        self.given_up.set()
        self._thread.shutdown(wait=True)
        self._open = []
