"""Opens weight files of the workflow with their records checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from dmd2.files import check_sha256, read_json
from dmd2.lineage.records import expect_digest, read_record
from dmd2.lineage.spec import Spec
from dmd2.method.denoiser import Teacher
from dmd2.teachers import load_teacher


def checked_record(path: Path, digest: str) -> dict[str, Any]:
    """The record of an artifact. Raises UserError if its checksum or the digest of its configuration differs."""
    record = read_record(path)
    expect_digest(path, record, digest)
    return record


def open_teacher(spec: Spec, path: Path, upstream: str = "teacher", components: Path | None = None) -> Teacher:
    """Loads the teacher's architecture with the weights in `path`: the teacher's or a student's.

    `components` is the record of a text-to-image teacher's other networks.
    """
    checked_record(path, spec.upstream[upstream])
    folder = None if components is None else components_folder(components, spec.upstream["components"])
    return load_teacher(spec.need("teacher"), spec.need("data"), path, components=folder)


def components_folder(record: Path, digest: str) -> Path:
    """The folder of components beside their record. Raises UserError for a file that differs from the record."""
    content = read_json(record)
    expect_digest(record, content, digest)
    for name, wanted in content["files"].items():
        check_sha256(record.parent / name, wanted)
    return record.parent


def open_weights(path: Path, digest: str) -> dict[str, Tensor]:
    """Loads the tensors of a safetensors file with its record checked."""
    checked_record(path, digest)
    return load_file(path)
