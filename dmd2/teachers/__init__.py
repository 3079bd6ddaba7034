"""Registry of teachers: the values of a preset's `teacher.kind` and their loaders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from dmd2 import config
from dmd2.errors import UserError, suggestion
from dmd2.files import check_sha256
from dmd2.method.denoiser import Codec, Conditioner, Denoiser, Teacher
from dmd2.teachers.edm import load_edm
from dmd2.teachers.mixture import load_mixture
from dmd2.teachers.pixels import pixel_space


class Loader(Protocol):
    """Builds one kind of teacher, with weights from a file or initialised from `seed`.

    `components` is the folder of a text-to-image teacher's other networks; without it they are only planned.
    """

    def __call__(
        self, teacher: Any, data: config.Data, weights: Path | None, *, seed: int = 0, components: Path | None = None
    ) -> Teacher: ...


class Kind(NamedTuple):
    """A kind of teacher: its loader, and its codec and conditioner, which do not need its network."""

    load: Loader
    space: Callable[[Any, config.Data, Path | None], tuple[Codec, Conditioner]]


def _in_pixels(load: Callable[..., Teacher]) -> Kind:
    """A kind of teacher in pixel space, which has no components."""

    def loaded(
        teacher: Any, data: config.Data, weights: Path | None, *, seed: int = 0, components: Path | None = None
    ) -> Teacher:
        return load(teacher, data, weights, seed=seed)

    return Kind(loaded, lambda teacher, data, components: pixel_space(data))


def _load_diffusers(
    teacher: Any, data: config.Data, weights: Path | None, *, seed: int = 0, components: Path | None = None
) -> Teacher:
    from dmd2.teachers.diffusers import load_diffusers  # importing diffusers takes seconds

    return load_diffusers(teacher, data, weights, seed=seed, components=components)


def _latent_space(teacher: Any, data: config.Data, components: Path | None) -> tuple[Codec, Conditioner]:
    from dmd2.teachers.diffusers import latent_space

    return latent_space(teacher, data, components)


TEACHERS: dict[str, Kind] = {
    "edm": _in_pixels(load_edm),
    "mixture": _in_pixels(load_mixture),
    "diffusers": Kind(_load_diffusers, _latent_space),
}


def load_space(
    teacher: config.AnyTeacher, data: config.Data, components: Path | str | None = None
) -> tuple[Codec, Conditioner]:
    """The codec and conditioner of the configured teacher. Raises UserError for an unknown kind."""
    _check_kind(teacher.kind)
    return TEACHERS[teacher.kind].space(teacher, data, None if components is None else Path(components))


def load_teacher(
    teacher: config.AnyTeacher,
    data: config.Data,
    weights: Path | str | None = None,
    *,
    seed: int = 0,
    components: Path | str | None = None,
) -> Teacher:
    """Loads the configured teacher: frozen, on the CPU, in evaluation mode.

    The weights come from `weights`, or else from the configured file (its SHA-256 is checked whenever it is read) or
    model folder; without either they are initialised from `seed`, without using torch's global generator. Raises
    UserError for an unknown kind and for a file that is missing or unsuitable.
    """
    _check_kind(teacher.kind)
    path = None if weights is None else Path(weights)
    configured = teacher.weights
    if isinstance(configured, config.WeightsFile) and (
        path is None or path.resolve() == Path(configured.path).resolve()
    ):
        path = Path(configured.path)
        check_sha256(path, configured.sha256)
    folder = None if components is None else Path(components)
    return TEACHERS[teacher.kind].load(teacher, data, path, seed=seed, components=folder)


def outline(teacher: config.AnyTeacher, data: config.Data) -> Denoiser:
    """A teacher's network on the meta device (no memory for weights)."""
    with torch.device("meta"):
        return load_teacher(teacher.model_copy(update={"weights": None}), data).denoiser


def _check_kind(kind: str) -> None:
    if kind not in TEACHERS:
        raise UserError(f"teacher.kind: no teacher {kind!r}; {suggestion(kind, TEACHERS)}")
