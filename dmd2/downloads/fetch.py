"""Fetches a large file over HTTP: resumed where it stopped, retried, checked, and in place only when whole.

What has arrived is in `NAME.part`, and the version of the server's file in `NAME.part.json`. It is continued from the
same address if that still has the same version (`If-Range`), or from any address if the caller knows the checksum.
Neither pooch, which starts a file that broke off again, nor huggingface_hub, which has no mirror of single files, does
this.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import requests
from filelock import FileLock, Timeout

from dmd2.errors import UserError
from dmd2.files import take_lock

TIMEOUT_S = (15, 60)
"""To connect, and between two pieces."""
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
CHUNK = 2**16
"""Bytes of a piece; when a connection breaks the piece that was on its way is lost."""


class Refused(Exception):
    """What an address sends is not the file; another address may have it."""


class _Again(Exception):
    """A connection that broke or an answer that may be better later."""


class Fetch:
    """One file to fetch to `target`.

    `accept(path)` raises `Refused` for a wrong content. `size` is known in advance or None; `pinned` says that
    `accept` knows the content, so that parts from different addresses may be put together. `progress(done, total)`
    counts bytes, with total None where nobody knows it.
    """

    def __init__(
        self,
        target: Path,
        accept: Callable[[Path], object],
        *,
        size: int | None = None,
        pinned: bool = False,
        progress: Callable[[int, int | None], object] = lambda done, total: None,
        retries: int = 5,
        backoff_s: float = 1.0,
    ):
        self._target, self._accept, self._size, self._pinned = target, accept, size, pinned
        self._progress, self._retries, self._backoff_s = progress, retries, backoff_s
        self._part = target.with_name(f"{target.name}.part")
        self._origin = target.with_name(f"{target.name}.part.json")
        self._session = requests.Session()

    def run(self, urls: Sequence[str]) -> str:
        """Fetches from the first address that has the file; returns it.

        Raises UserError with what each address said, and at once where the disk has no room.
        """
        self._target.parent.mkdir(parents=True, exist_ok=True)
        lock = self._target.with_name(f".{self._target.name}.lock")
        try:
            held = take_lock(FileLock(lock))
            try:
                return self._first(urls)
            finally:
                lock.unlink(missing_ok=True)
                held.release()
        except Timeout:
            raise UserError(f"{self._target} is being fetched by another process; wait for it and run again") from None

    def _first(self, urls: Sequence[str]) -> str:
        problems = []
        for url in urls:
            try:
                self._from(url)
                return url
            except Refused as problem:
                problems.append(f"{url}: {problem}")
        raise UserError("; ".join(problems))

    def _from(self, url: str) -> None:
        resumed = self._part.exists()
        while True:
            self._transfer(url)
            self._part.touch()  # of an empty file nothing arrives
            try:
                self._accept(self._part)
            except Refused:
                self._discard()
                if not resumed:
                    raise
                resumed = False  # what was there before may have been damaged: once more from the start
                continue
            os.replace(self._part, self._target)
            self._origin.unlink(missing_ok=True)
            return

    def _transfer(self, url: str) -> None:
        """Completes the part; gives up after `retries` attempts in a row that brought nothing."""
        failures = 0
        while True:
            before = self._have()
            try:
                return self._attempt(url)
            except (_Again, requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as e:
                failures = 1 if self._have() > before else failures + 1
                if failures > self._retries:
                    raise Refused(f"no connection or broken off {failures} times ({_brief(e)})") from None
                time.sleep(self._backoff_s * 2 ** (failures - 1))
            except requests.RequestException as e:
                raise Refused(_brief(e)) from None

    def _attempt(self, url: str) -> None:
        headers = {"Accept-Encoding": "identity", **self._resumption(url)}
        with self._session.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as answer:
            total = self._begin(answer, asked_for_rest="Range" in headers)
            if total == self._have():
                return
            self._origin.write_text(json.dumps({"url": url, "version": _version(answer)}), encoding="utf-8")
            with self._part.open("ab") as file:
                for chunk in answer.iter_content(CHUNK):
                    file.write(chunk)
                    self._progress(file.tell(), total)
                os.fsync(file.fileno())
        if total is not None and self._have() != total:
            raise _Again(f"{self._have()} of {total} bytes")

    def _resumption(self, url: str) -> dict[str, str]:
        """The headers that ask for the rest of what is there; without them everything is sent."""
        if not (have := self._have()):
            return {}
        rest = {"Range": f"bytes={have}-"}
        if self._pinned:
            return rest
        try:
            origin = json.loads(self._origin.read_text(encoding="utf-8"))
            same = origin["url"] == url and origin["version"]
        except (OSError, ValueError, KeyError, TypeError):
            same = None
        return {**rest, "If-Range": same} if same else {}

    def _begin(self, answer: requests.Response, *, asked_for_rest: bool) -> int | None:
        """Checks the answer's head and empties the part if all is sent anew; returns the file's whole size."""
        if answer.status_code in TRANSIENT:
            raise _Again(f"status {answer.status_code}")
        if answer.status_code == 416 and asked_for_rest:
            total = _range(answer)[1]
            if total != self._have():
                self._discard()
                raise _Again("the part is not of this file")
            return total
        answer.raise_for_status()
        if "text/html" in answer.headers.get("Content-Type", ""):
            raise Refused("answers with a web page instead of the file")
        if answer.status_code == 206:
            start, total = _range(answer)
            if start != self._have():
                self._discard()
                raise _Again("another part than the requested one")
        else:
            self._discard()
            length = answer.headers.get("Content-Length", "")
            total = int(length) if length.isdigit() else None
        if self._size is not None and total not in (None, self._size):
            raise Refused(f"has {total} bytes instead of {self._size}")
        self._check_room(total or self._size)
        return total

    def _check_room(self, total: int | None) -> None:
        needed, free = (total or 0) - self._have(), shutil.disk_usage(self._target.parent).free
        if needed > free:
            raise UserError(
                f"{self._target}: {needed / 1e9:.1f} GB are still to come, {free / 1e9:.1f} GB are free; make room, or "
                f"make {self._target.parent} a link to a larger disk, and run again: what has arrived is kept"
            )

    def _have(self) -> int:
        return self._part.stat().st_size if self._part.exists() else 0

    def _discard(self) -> None:
        self._part.unlink(missing_ok=True)
        self._origin.unlink(missing_ok=True)


def _range(answer: requests.Response) -> tuple[int | None, int | None]:
    """(first byte, whole size) of a Content-Range header: `bytes 5-9/10`, `bytes 5-9/*` or `bytes */10`."""
    span, _, total = answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
    start = span.partition("-")[0]
    return int(start) if start.isdigit() else None, int(total) if total.isdigit() else None


def _version(answer: requests.Response) -> str | None:
    """What `If-Range` may name: a strong ETag, or the time of the last change."""
    tag = answer.headers.get("ETag", "")
    return tag if tag.startswith('"') else answer.headers.get("Last-Modified")


def _brief(error: BaseException) -> str:
    """What is at the bottom of the error, on one line of bounded length."""
    while error.__context__ is not None:
        error = error.__context__
    return " ".join(str(error).split())[:200]
