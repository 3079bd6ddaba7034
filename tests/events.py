"""What tests wait for: what another process or thread does, and its end. pytest's time limit ends a test that hangs."""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess


def wait_until(happened: Callable[[], object], process: subprocess.Popen[str] | BaseProcess | None = None) -> None:
    """Waits until `happened` is true; fails if `process`, which has to bring that about, ended before."""
    while not happened():
        status = process.poll() if isinstance(process, subprocess.Popen) else process and process.exitcode
        if status is not None and not happened():
            said = process.communicate() if isinstance(process, subprocess.Popen) else ""
            raise AssertionError(f"it ended with {status}: {said}")
        time.sleep(0.005)


def wait_for_end(*pids: int) -> None:
    """Waits until none of the processes runs; they need not be this one's children."""
    for pid in pids:
        with suppress(ProcessLookupError):
            file = os.pidfd_open(pid)
            try:
                select.select([file], [], [])
            finally:
                os.close(file)
