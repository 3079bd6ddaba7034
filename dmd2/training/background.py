"""Work beside the main thread, one piece at a time, whose errors come to light there."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event


class Background:
    """Runs calls in the order they were given, in one thread; or at once, where it is not `enabled`."""

    def __init__(self, *, enabled: bool = True):
        self._enabled = enabled
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="background")  # starts its thread when first used
        self._open: list[Future[None]] = []
        self.given_up = Event()
        """Set when nobody waits for the work any more; a call that waits for something should then end."""

    def do(self, call: Callable[[], None]) -> None:
        """Does `call`, beside what follows or at once. The caller must leave alone what it reads."""
        if self._enabled:
            self._open.append(self._thread.submit(call))
        else:
            call()

    def check(self) -> None:
        """Raises what went wrong in a call that has ended, without waiting for others."""
        ended = [work for work in self._open if work.done()]
        self._open = [work for work in self._open if not work.done()]
        for work in ended:
            work.result()

    def wait(self) -> None:
        """Waits for all calls and raises what went wrong in the first bad one."""
        work, self._open = self._open, []
        for each in work:
            each.result()

    def end(self) -> None:
        """Waits for all calls, which are told that nobody waits for others any more; what goes wrong is dropped."""
        self.given_up.set()
        self._thread.shutdown(wait=True)
        self._open = []
