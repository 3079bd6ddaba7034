"""Atomic files, JSON and checksums."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmd2.errors import UserError

if TYPE_CHECKING:
    from filelock import BaseFileLock


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path`, flushed to disk, when the block succeeds.

    On any error the temporary file is removed and whatever stood at `path` before is still there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@cache
def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path | str, text: str) -> None:
    """Writes a text file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. NaN is refused: a record must be readable anywhere."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path | str) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises UserError naming the file if it is missing, truncated or not an object.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the rule that writes it, or restore it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged JSON ({error}); delete it and run the workflow again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object; delete it and run the workflow again")
    return value


def sha256(path: Path | str) -> str:
    """The hexadecimal SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(
    path: Path | str, wanted: str | None, remedy: str = "fetch it again or correct the configured `sha256`"
) -> None:
    """Raises UserError for a file whose SHA-256 is not `wanted`; None accepts any."""
    if wanted is None:
        return
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; put it there or correct the configured path")
    if (found := sha256(path)) != wanted:
        raise UserError(f"{path}: its SHA-256 is {found}, expected {wanted}; {remedy}")


NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def take_lock(lock: BaseFileLock) -> BaseFileLock:
    """Takes a lock without waiting and returns it.

    Raises `filelock.Timeout` if another process holds it, and UserError where the file system has no locks.
    """
    try:
        with open(lock.lock_file, "ab") as file, suppress(BlockingIOError):  # held: `acquire` raises Timeout
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # without locks, filelock falls back to a mere file
        lock.acquire(timeout=0)
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in NO_LOCKS:
            raise
        raise UserError(
            f"{lock.lock_file}: this file system has no locks ({error}), without which two processes could write the "
            f"same files; put its folder on another disk (a link will do), or have it mounted with locks"
        ) from None
    return lock
