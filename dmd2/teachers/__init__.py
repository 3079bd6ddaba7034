"""Registry of teachers: the values of a preset's `teacher.kind` and their loaders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from dmd2 import config
from dmd2.errors import UserError, suggestion
from dmd2.files import check_sha256
from dmd2.method.denoiser import Codec, Conditioner, Denoiser, Teacher
from dmd2.teachers.edm import load_edm
from dmd2.teachers.mixture import load_mixture
from dmd2.teachers.pixels import pixel_space


class Loader(Protocol):
    """Builds one kind of teacher, with weights from a file or initialised from `seed`."""

    def __call__(
        self, teacher: config.TeacherConfig, data: config.Data, weights: Path | None, *, seed: int = 0
    ) -> Teacher: ...


class Kind(NamedTuple):
    """A kind of teacher: its loader, and its codec and conditioner, which do not need its network."""

    load: Loader
    space: Callable[[config.Data], tuple[Codec, Conditioner]]


TEACHERS: dict[str, Kind] = {
    "edm": Kind(load_edm, pixel_space),
    "mixture": Kind(load_mixture, pixel_space),
}


def load_space(teacher: config.TeacherConfig, data: config.Data) -> tuple[Codec, Conditioner]:
    """The codec and conditioner of the configured teacher. Raises UserError for an unknown kind."""
    _check_kind(teacher.kind)
    return TEACHERS[teacher.kind].space(data)


def load_teacher(
    teacher: config.TeacherConfig, data: config.Data, weights: Path | str | None = None, *, seed: int = 0
) -> Teacher:
    """Loads the configured teacher: frozen, on the CPU, in evaluation mode.

    The weights come from `weights`, or else from the configured file (its SHA-256 is checked whenever it is read);
    without either they are initialised from `seed`, without using torch's global generator. Raises UserError for an
    unknown kind and for a file that is missing or unsuitable.
    """
    _check_kind(teacher.kind)
    path = None if weights is None else Path(weights)
    configured = teacher.weights
    if configured is not None and (path is None or path.resolve() == Path(configured.path).resolve()):
        path = Path(configured.path)
        check_sha256(path, configured.sha256)
    return TEACHERS[teacher.kind].load(teacher, data, path, seed=seed)


def outline(teacher: config.TeacherConfig, data: config.Data) -> Denoiser:
    """A teacher's network on the meta device (no memory for weights)."""
    with torch.device("meta"):
        return load_teacher(teacher.model_copy(update={"weights": None}), data).denoiser


def _check_kind(kind: str) -> None:
    if kind not in TEACHERS:
        raise UserError(f"teacher.kind: no teacher {kind!r}; {suggestion(kind, TEACHERS)}")
