"""Files from outside: what presets may name under `data/downloads`, whether it is there, and how it gets there.

`workflow/downloads.yaml` lists them by file name. No torch, and no connection unless `provide` is called.

A file of that folder is vouched for by its record `NAME.json` (size, SHA-256, whether that was compared with a
published one). The record, not the file, is what a rule makes and others wait for: Snakemake deletes a rule's outputs
before it starts a job, and a file that the user has put there must survive that.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from dmd2 import files
from dmd2.config import Data, Model, ModelFolder, Preset, Prompts, Run, WeightsFile
from dmd2.config.data import is_url
from dmd2.config.reading import parse, read_yaml
from dmd2.downloads.hub import is_hub_id, resolve
from dmd2.errors import UserError
from dmd2.progress import Progress

FOLDER = Path("data/downloads")
log = logging.getLogger(__name__)


class Download(Model):
    """A file or folder from outside. Without `url` or `hub` it cannot be fetched; `how` says what to do instead."""

    what: str
    page: str
    licence: str
    url: str | None = None
    mirrors: tuple[str, ...] = ()
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    md5: str | None = Field(None, pattern="^[0-9a-f]{32}$")
    bytes: int | None = Field(None, gt=0)
    how: str | None = None
    folder: bool = Field(False, description="a folder, of which the record has the number of files and their size")
    hub: str | None = Field(None, description="repository of the Hugging Face hub that becomes the folder")
    revision: str | None = Field(None, description="the repository's commit")
    patterns: tuple[str, ...] = Field((), description="the repository's files that are needed; none: all")

    @model_validator(mode="after")
    def _a_repository_is_a_folder(self) -> Self:
        if self.hub is not None and not (self.folder and self.revision):
            raise ValueError("`hub` needs `folder: true` and a `revision`")
        return self

    @property
    def pinned(self) -> bool:
        """Whether a checksum is known in advance."""
        return (self.sha256 or self.md5) is not None

    def urls(self, name: str, mirror: str | None = None) -> list[str]:
        """The addresses to ask, in order."""
        own = [self.url, *self.mirrors] if self.url else []
        return [f"{mirror.rstrip('/')}/{name}", *own] if mirror else own

    def advice(self, name: str) -> str:
        """What the user does where nothing can be fetched, on one line."""
        known = [f"{kind} {value}" for kind, value in (("SHA-256", self.sha256), ("MD5", self.md5)) if value]
        checked = f" ({known[0]})" if known else ""
        source = f"{self.hub} at revision {self.revision}" if self.hub else self.url or self.page
        where = f"{self.how}; see {self.page}" if self.how else f"fetch {source} elsewhere"
        return f"{where.rstrip('.')}; put it at {FOLDER / name}{checked}"


def load_catalogue(path: Path | str) -> dict[str, Download]:
    """The catalogue in a YAML file, by file name."""
    return {name: parse(Download, entry or {}, f"{path}: {name}") for name, entry in read_yaml(path).items()}


def record_of(name: str) -> Path:
    """The record of a file of the folder."""
    return FOLDER / f"{name}.json"


def requirement(
    path: str | WeightsFile | ModelFolder | None, key: str, catalogue: dict[str, Download], *, done: bool = False
) -> Path | None:
    """The record that a job must wait for before it reads `path`; None where it may start at once.

    `key` names the setting in errors; `done` says that what is made from the file is there, so that it may be gone.
    Raises UserError for a path where nothing is and nothing can be put, for a file that is gone from its record, and
    for a repository of the hub that is not in its local cache.
    """
    if isinstance(path, ModelFolder) and not done and is_hub_id(path.path) and not Path(path.path).exists():
        resolve(path)
        return None
    if isinstance(path, WeightsFile | ModelFolder):
        path, key = path.path, f"{key}.path"
    if path is None:
        return None
    file = Path(path)
    if file.parent == FOLDER and file.name in catalogue:
        record = record_of(file.name)
        if record.exists() and not file.exists() and not done:
            raise UserError(f"{key}: {path} is gone; put it back, or delete {record} to have it fetched again")
        return record
    if not done and not file.exists() and not _is_pattern(path):
        known = f"; files that can be fetched go by {FOLDER}/NAME, NAME one of {', '.join(sorted(catalogue))}"
        raise UserError(f"{key}: {path} does not exist; put it there or correct the path{known}")
    return None


def _is_pattern(path: str) -> bool:
    """Whether only the stage that reads `path` can tell if something is there."""
    return is_url(path) or any(sign in path for sign in "*?[{")


def needed_downloads(preset: Preset, runs: Iterable[Run] = ()) -> dict[str, list[str]]:
    """The paths from outside that a preset and runs on it name, each with the keys that name it."""
    found: dict[str, list[str]] = {}
    for prefix, part in [("", preset), *((f"run {run.name}: ", run) for run in runs)]:
        for key, path in _paths(part, prefix):
            found.setdefault(path, []).append(key)
    return found


def _paths(model: Model, prefix: str) -> Iterator[tuple[str, str]]:
    """Every path named in a model or in the models in it, with its key."""
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, ModelFolder):
            yield f"{prefix}{name}", _local_path(value)
        elif isinstance(value, WeightsFile | Prompts):
            if value.path is not None:
                yield f"{prefix}{name}", value.path
        elif isinstance(value, Data):
            if value.path is not None:
                yield f"{prefix}{name}.path", value.path
            if value.annotations is not None:
                yield f"{prefix}{name}.annotations", value.annotations
        elif isinstance(value, Model):
            yield from _paths(value, f"{prefix}{name}.")


def _local_path(model: ModelFolder) -> str:
    """The path of a model: its folder, or that of its repository in the hub's cache if it is there."""
    if not is_hub_id(model.path):
        return model.path
    try:
        return str(resolve(model))
    except UserError:
        return model.path


def state(path: str, catalogue: dict[str, Download]) -> str:
    """Whether a file from outside is there: one word or a few for a list."""
    file = Path(path)
    listed = file.parent == FOLDER and file.name in catalogue
    if is_url(path):
        return "elsewhere"
    if file.exists() or _is_pattern(path):
        return "there" if not listed or record_of(file.name).exists() else "there, not checked yet"
    if not listed:
        return "missing"
    entry = catalogue[file.name]
    return "is fetched when needed" if entry.url or entry.hub else "to be supplied"


def provide(name: str, entry: Download, mirror: str | None = None, folder: Path = FOLDER) -> dict[str, Any]:
    """Checks the file in `folder`, or fetches it first; writes its record and returns it.

    Raises UserError for a file that is not the published one, and where it cannot be fetched, with what to put where.
    """
    path, url = folder / name, None
    if entry.folder:
        return _provide_folder(path, name, entry)
    if path.exists():
        sha256 = _identify(path, entry, f"{path}: ", "replace it, or delete it to have it fetched")
    elif urls := entry.urls(name, mirror):
        sha256, url = _fetch(path, name, entry, urls)
    else:
        raise UserError(f"{path} is missing and cannot be fetched by a program: {entry.advice(name)}")
    record = {"file": name, "bytes": path.stat().st_size, "sha256": sha256, "compared": entry.pinned, "url": url}
    if not entry.pinned:
        log.info("%s: SHA-256 %s, compared with nothing: no published one is known; pin it in the preset", path, sha256)
    files.write_json(path.with_name(f"{name}.json"), record)
    return record


def _provide_folder(path: Path, name: str, entry: Download) -> dict[str, Any]:
    """Fetches a folder from the hub unless it is there; writes its record and returns it."""
    if not path.exists() and entry.hub is None:
        raise UserError(f"{path} is missing and cannot be fetched by a program: {entry.advice(name)}")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, but {entry.what} is a folder; replace it")
    if not path.exists():
        _fetch_repository(path, name, entry)
    sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file() and ".cache" not in file.parts]
    if not sizes:
        raise UserError(f"{path} is empty: {entry.advice(name)}")
    record = {"folder": name, "files": len(sizes), "bytes": sum(sizes), "hub": entry.hub, "revision": entry.revision}
    files.write_json(path.with_name(f"{name}.json"), record)
    return record


def _fetch_repository(path: Path, name: str, entry: Download) -> None:
    """Fetches a repository of the hub; an interrupted one goes on in the folder NAME.part."""
    from huggingface_hub import snapshot_download

    log.info("%s: %s; licence: %s", name, entry.what, entry.licence)
    part = path.with_name(f"{name}.part")
    patterns = list(entry.patterns) or None
    try:
        snapshot_download(str(entry.hub), revision=entry.revision, local_dir=part, allow_patterns=patterns)
    except Exception as error:  # the hub's client raises many types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: {entry.hub} could not be fetched ({reason}); {entry.advice(name)}") from None
    part.rename(path)


def _fetch(path: Path, name: str, entry: Download, urls: list[str]) -> tuple[str, str]:
    """(SHA-256, address) of the fetched file."""
    from dmd2.downloads.fetch import Fetch, Refused

    found: list[str] = []

    def accept(part: Path) -> None:
        try:
            found[:] = [_identify(part, entry, "", "")]
        except UserError as error:
            raise Refused(str(error).strip("; ")) from None

    meter = Progress(name, None, unit="B", scale=True)
    job = Fetch(path, accept, size=entry.bytes, pinned=entry.pinned, progress=meter.update_total)
    log.info("%s: %s; licence: %s", name, entry.what, entry.licence)
    try:
        url = job.run(urls)
    except UserError as error:
        raise UserError(f"{error}; {entry.advice(name)}") from None
    return found[0], url


def _identify(path: Path, entry: Download, where: str, remedy: str) -> str:
    """The SHA-256 of a file that is the one that `entry` describes. Raises UserError for another."""
    size = path.stat().st_size
    if entry.bytes not in (None, size):
        raise UserError(f"{where}it has {size} bytes, the published file {entry.bytes}; {remedy}")
    digests = {"sha256": hashlib.sha256(), "md5": hashlib.md5(usedforsecurity=False)}
    wanted = {kind: value for kind in digests if (value := getattr(entry, kind)) is not None}
    used = {kind: digest for kind, digest in digests.items() if kind == "sha256" or kind in wanted}
    meter = Progress(f"checking {path.name}", size, unit="B", scale=True)
    with path.open("rb") as file:
        while block := file.read(2**22):
            for digest in used.values():
                digest.update(block)
            meter.update(file.tell())
    for kind, value in wanted.items():
        if (found := used[kind].hexdigest()) != value:
            raise UserError(f"{where}its {kind.upper()} is {found}, the published file's {value}; {remedy}")
    return used["sha256"].hexdigest()
