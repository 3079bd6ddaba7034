"""Weight files of the workflow: opened with their record checked, so that no stage builds on a foreign one."""

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
    """The record of an artifact, after its checksum and the configuration it was made under were checked."""
    record = read_record(path)
    expect_digest(path, record, digest)
    return record


def open_teacher(spec: Spec, path: Path, upstream: str = "teacher") -> Teacher:
    """The teacher's architecture with the weights in `path`: the teacher's own, or a student's."""
    checked_record(path, spec.upstream[upstream])
    return load_teacher(spec.need("teacher"), spec.need("data"), path)


def open_weights(path: Path, digest: str) -> dict[str, Tensor]:
    """The tensors of a checked safetensors file."""
    checked_record(path, digest)
    return load_file(path)
