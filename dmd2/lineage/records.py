"""Records: checksum and provenance of every artifact.

A record is the JSON file with an artifact's name and the suffix `.json`. It has the stage and the digest of everything
that determines the artifact's content, so that a reader can reject an unexpected file.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from dmd2.errors import UserError
from dmd2.files import read_json, sha256, write_json
from dmd2.lineage.spec import Spec

PACKAGES = ("torch", "triton", "diffusers", "numpy", "webdataset", "clean-fid", "snakemake")


@cache
def commit() -> str:
    """The git commit of the code, with "+changes" if tracked files differ from it.

    "unknown" outside git, and where the code was unpacked inside a repository of something else.
    """
    here = Path(__file__).parent
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}  # they may name another one

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True, timeout=20, env=env
        )
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != here.parents[1].resolve():
            return "unknown"
        git("ls-files", "--error-unmatch", Path(__file__).name)  # it may be the root of something else's repository
        head = git("rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that may affect results."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def identity(spec: Spec) -> dict[str, Any]:
    """The part of an artifact's provenance that does not depend on time and place."""
    return {"stage": spec.stage, "name": spec.name, "digest": spec.digest}


def provenance(spec: Spec) -> dict[str, Any]:
    """The provenance of an artifact: stage, digest, exact configuration, commit, versions and time."""
    return {
        **identity(spec),
        "spec": json.loads(spec.to_json()),
        "commit": commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }


def record_path(artifact: Path | str) -> Path:
    """The path of the record: the artifact's with the suffix `.json`."""
    return Path(artifact).with_suffix(".json")


def write_record(artifact: Path | str, spec: Spec, **facts: Any) -> None:
    """Writes the record of a finished artifact: checksum, size in bytes, `facts` and provenance."""
    artifact = Path(artifact)
    content = {
        "artifact": artifact.name,
        "sha256": sha256(artifact),
        "bytes": artifact.stat().st_size,
        **facts,
        "provenance": provenance(spec),
    }
    write_json(record_path(artifact), content)


def read_record(artifact: Path | str, *, verify: bool = True) -> dict[str, Any]:
    """Reads the record of `artifact` and verifies the artifact's checksum.

    Raises UserError naming the file if either is missing, or if the checksum differs.
    """
    artifact = Path(artifact)
    record = read_json(record_path(artifact))
    if not artifact.exists():
        raise UserError(f"{artifact}: no such file, although its record exists; run the workflow again")
    if "sha256" not in record or "provenance" not in record:
        raise UserError(f"{record_path(artifact)}: not a record (no sha256 or provenance); delete it and run again")
    if verify and sha256(artifact) != record["sha256"]:
        raise UserError(
            f"{artifact}: its SHA-256 differs from the record's: the file was damaged or replaced; "
            f"delete it and run the workflow again"
        )
    return record


def expect_digest(path: Path | str, content: dict[str, Any], wanted: str) -> None:
    """Raises UserError unless an artifact was made under the configuration with digest `wanted`.

    `content` is a record or manifest with a `provenance` entry.
    """
    found = content.get("provenance", {}).get("digest")
    if found != wanted:
        raise UserError(
            f"{path}: made with configuration {found}, but this run expects {wanted}; "
            f"delete it and run the workflow again"
        )
