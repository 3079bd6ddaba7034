"""A parallel map over processes (threads would contend for the GIL)."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from dmd2.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

_task: Callable[[Any], Any]


def each(task: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Yields `task(item)` in order of completion; with one worker in this process, in the items' order.

    With several, the task (once per process) and its results are pickled. The first exception terminates the others.
    Raises UserError if a process is killed from outside.
    """
    items = list(items)
    if workers == 1 or len(items) < 2:
        yield from map(task, items)
        return
    before = set(multiprocessing.active_children())
    # A fork of this process would inherit the locks of torch's threads; one of a server of forks does not, and finds
    # torch imported, which webdataset's writer needs.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["webdataset"])
    pool = ProcessPoolExecutor(min(workers, len(items)), context, _begin, (task,))
    try:
        for future in as_completed([pool.submit(_run, item) for item in items]):
            yield future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps out of memory; run again with fewer threads: finished work is kept"
        ) from None
    except BaseException:
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(task: Callable[[Any], Any]) -> None:
    """Initialises a worker: stores the task, ignores Ctrl-C (the parent's job), and exits with the parent."""
    global _task
    _task = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(item: Any) -> Any:
    return _task(item)
