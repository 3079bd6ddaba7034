"""What servers and stores say about a file, repeated with growing pauses while they do not answer.

HTTP goes by requests, everything else by fsspec.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit, urlunsplit

import requests

from dmd2.downloads.fetch import TIMEOUT_S, TRANSIENT
from dmd2.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")
RETRIES = 5
BACKOFF_S = 1.0
"""Seconds before the second attempt; doubled before each further one."""


class Identity(NamedTuple):
    """What a server says about a file: its size in bytes and its version (ETag or time of change), if it says so."""

    size: int | None
    version: str


def shown(url: str) -> str:
    """The URL without what may be secret, for messages: password and query."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def identify(url: str) -> Identity:
    """Size and version of a remote file. Raises FileNotFoundError where there is none, UserError if nobody answers."""
    return retried(url, lambda: _of_http(url) if url.startswith("http") else _of_fsspec(url))


def matching(pattern: str) -> list[str]:
    """The URLs that match a pattern with `*`, sorted. Raises UserError for HTTP, which lists nothing."""
    if pattern.startswith("http"):
        raise UserError(f"{shown(pattern)}: a web server lists no files; name them by a range such as {{0000..0099}}")
    system, path = file_system(pattern)
    return sorted(system.unstrip_protocol(found) for found in retried(pattern, lambda: system.glob(path)))


def retried(url: str, attempt: Callable[[], T]) -> T:
    """What `attempt` returns, tried again with growing pauses after errors that may pass.

    Raises FileNotFoundError at once, and UserError for one that stays.
    """
    for number in range(RETRIES + 1):
        try:
            return attempt()
        except (FileNotFoundError, UserError):
            raise
        except PermissionError as error:
            raise UserError(f"{shown(url)}: access refused ({_line(error)}); check the credentials") from None
        except requests.exceptions.InvalidURL:
            raise UserError(f"{shown(url)}: not a valid URL; correct it") from None
        except Exception as error:  # clients of stores raise many types
            if number == RETRIES:
                raise UserError(f"{shown(url)}: failed {number + 1} times ({_line(error)}); run again later") from None
            pause = BACKOFF_S * 2**number
            log.warning("%s: %s; attempt %d follows in %g s", shown(url), _line(error), number + 2, pause)
            time.sleep(pause)
    raise AssertionError("unreachable")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _of_http(url: str) -> Identity:
    headers = {"Accept-Encoding": "identity"}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as answer:
        if answer.status_code in (404, 410):
            raise FileNotFoundError(url)
        if answer.status_code in TRANSIENT:
            raise ConnectionError(f"status {answer.status_code}")
        if not answer.ok:
            raise UserError(f"{shown(url)}: status {answer.status_code}; check the address and the access to it")
        length = answer.headers.get("Content-Length", "")
        version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        return Identity(int(length) if length.isdigit() else None, version)


def _of_fsspec(url: str) -> Identity:
    system, path = file_system(url)
    found = system.info(path)
    version = next((str(found[key]) for key in ("ETag", "etag", "LastModified", "mtime") if found.get(key)), "")
    return Identity(found.get("size"), version)


def file_system(url: str) -> tuple[Any, str]:
    """The file system of fsspec that a URL belongs to, and the path in it."""
    import fsspec  # slow, and local files need none of it

    try:
        system, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError:
        raise UserError(
            f"{shown(url)}: needs a package for {url.partition(':')[0]}; run `pip install 'dmd2[remote]'`"
        ) from None
    return system, path
