"""Whether shards are still those of the data that is configured, for planning: fast, without reading an image.

Shards keep the fingerprint of their source, which lists every image: a minute for ImageNet. `source.json` beside the
manifest therefore has the time stamps under which it was found last; while they are the same nothing is listed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from glob import glob
from pathlib import Path
from typing import Any

from dmd2 import files
from dmd2.config import Data
from dmd2.config.data import is_url
from dmd2.errors import UserError

FILES = 20_000
"""Most files whose time stamps are compared one by one; of a larger tree only those of its folders."""


def seen(data: Data) -> dict[str, Any]:
    """The place and the time stamps of a source, to be taken before it is listed; empty without a path."""
    return {} if data.path is None or is_url(data.path) else {"path": _place(data), "stamps": _stamps(data)}


def remember(manifest: Path, fingerprint: str, sight: dict[str, Any]) -> None:
    """Writes under which time stamps (`seen`) a source had a fingerprint beside the manifest of its shards."""
    if sight:
        content = json.dumps({"fingerprint": fingerprint, **sight}, indent=1)  # ASCII: paths may not be UTF-8
        files.write_text(manifest.with_name("source.json"), f"{content}\n")


def is_of_other_data(manifest: Path, data: Data) -> bool:
    """Whether shards were made from other data than `data.path` has now.

    False where that is unknown: without a path or with one where there is nothing any more, which shards do not
    need, and without shards. Raises UserError if there is something that is not such a source.
    """
    made = _fingerprint_of(manifest)
    if made is None or data.path is None or data.is_made or not _roots(data):
        return False
    known = _known(manifest)
    if known.get("fingerprint") == made and known.get("path") == _place(data) and _unchanged(known["stamps"], data):
        return False
    from dmd2.datasets.sources import open_source  # slow: imports Pillow and lists the images

    sight = seen(data)
    try:
        found = open_source(data).fingerprint
    except UserError as error:
        raise UserError(f"{error} (or leave data.path away: {manifest} is there)") from None
    if found != made:
        return True
    with suppress(OSError):  # a folder of someone else: the next planning lists the images again
        remember(manifest, made, sight)
    return False


def _fingerprint_of(manifest: Path) -> str | None:
    """The fingerprint of the source that shards were made from.

    None without shards, if they are damaged, and if they are elsewhere, with what they were made from.
    """
    try:
        first = files.read_json(manifest)["shards"][0]["name"]
        if "/" in first:
            return None
        return str(files.read_json(manifest.with_name(first).with_suffix(".json"))["inputs"])
    except (UserError, LookupError, TypeError, OSError):
        return None


def _known(manifest: Path) -> dict[str, Any]:
    try:
        return files.read_json(manifest.with_name("source.json"))
    except (UserError, OSError):
        return {}


def _place(data: Data) -> str:
    return os.path.realpath(data.path or "")


def _roots(data: Data) -> list[str]:
    """The files or the folder of a source that are there."""
    path = data.path or ""
    if is_url(path):  # planning connects to no server
        return []
    if Path(path).exists():
        found = [path]
    elif data.source == "webdataset" or "*" in path:
        from dmd2.datasets.sources.tars import expand

        try:
            found = expand(data)
        except UserError:
            found = sorted(glob(path))
    else:
        found = []
    return found + [file for file in (data.annotations,) if found and file and Path(file).exists()]


def _stamps(data: Data) -> dict[str, Any]:
    """The time stamps of the folders below a source, and a checksum of those of its files, if they are few."""
    folders: dict[str, int] = {}
    digest, count = hashlib.sha256(), 0
    for path, is_folder in _below(_roots(data)):
        if is_folder:
            folders[path] = os.stat(path).st_mtime_ns
        elif count < FILES:
            digest.update(_stamp(path))
        count += not is_folder
    return {"folders": folders, "files": digest.hexdigest() if count <= FILES else None}


def _unchanged(stamps: dict[str, Any], data: Data) -> bool:
    """Whether a source still has these time stamps."""
    if stamps["files"] is not None:
        return _stamps(data) == stamps
    try:
        return all(os.stat(folder).st_mtime_ns == time for folder, time in stamps["folders"].items())
    except OSError:
        return False


def _below(roots: list[str]) -> Iterator[tuple[str, bool]]:
    """(path, whether it is a folder) of everything at and below the paths, links followed, in a fixed order."""
    for root in roots:
        if not os.path.isdir(root):
            yield root, False
            continue
        for top, names, found in os.walk(root, followlinks=True):
            names.sort()
            names[:] = [name for name in names if not _is_circle(top, name)]
            yield top, True
            yield from ((os.path.join(top, name), False) for name in sorted(found))


def _is_circle(top: str, name: str) -> bool:
    path = os.path.join(top, name)
    return os.path.islink(path) and f"{os.path.realpath(top)}/".startswith(f"{os.path.realpath(path)}/")


def _stamp(path: str) -> bytes:
    try:
        status = os.stat(path)
    except OSError:  # a link to nowhere, of which the source tells
        return os.fsencode(path)
    return os.fsencode(f"{path} {status.st_size} {status.st_mtime_ns}\n")
