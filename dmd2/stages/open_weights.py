"""Opens weight files of the workflow with their records checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from dmd2.lineage.records import expect_digest, read_record
from dmd2.lineage.spec import Spec
from dmd2.method.denoiser import Teacher
from dmd2.teachers import load_teacher


def checked_record(path: Path, digest: str) -> dict[str, Any]:
    """The record of an artifact. Raises UserError if its checksum or the digest of its configuration differs."""
    record = read_record(path)
    expect_digest(path, record, digest)
    return record


def open_teacher(spec: Spec, path: Path, upstream: str = "teacher") -> Teacher:
    """Loads the teacher's architecture with the weights in `path`: the teacher's or a student's."""
    checked_record(path, spec.upstream[upstream])
    return load_teacher(spec.need("teacher"), spec.need("data"), path)


def open_weights(path: Path, digest: str) -> dict[str, Tensor]:
    """Loads the tensors of a safetensors file with its record checked."""
    checked_record(path, digest)
    return load_file(path)
