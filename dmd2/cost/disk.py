"""What a preset takes from outside, and what it writes: files that have to be there, and room on disks. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dmd2.config import Data, DiffusersTeacherConfig, ModelFolder, Prompts, WeightsFile
from dmd2.config.data import is_url
from dmd2.downloads.catalogue import FOLDER, load_catalogue
from dmd2.lineage.jobs import Job
from dmd2.lineage.plan import Plan

TAR_OVERHEAD = 2560
"""Bytes of a sample in a shard beside its content: two members' headers and padding."""
CHECKPOINTS = 1
"""Checkpoints in the state folder beside those that are kept: the one being written."""


@dataclass(frozen=True)
class Supply:
    """A file or folder from outside."""

    what: str
    path: str
    sha256: str | None
    there: bool
    by_rule: bool  # whether a download job checks it, and fetches it where it is public
    advice: str | None  # what to do about it, where no job can fetch it
    bytes: int | None  # where they are known before it is there


def supplies(plan: Plan, jobs: Iterable[Job]) -> list[Supply]:
    """What the jobs read that comes from outside, each path once."""
    preset, catalogue = plan.preset, load_catalogue(plan.folder / "downloads.yaml")
    found: dict[str, Supply] = {}

    def ask(what: str, file: WeightsFile | ModelFolder | Prompts | Data | None) -> None:
        if file is None or file.path is None:
            return
        path, sha256 = Path(file.path), getattr(file, "sha256", None)
        entry = catalogue.get(path.name) if path.parent == FOLDER else None
        fetched = entry is not None and (entry.url or entry.hub)
        advice = f"put it at {path}" if entry is None else None if fetched else entry.advice(path.name)
        size = None if entry is None else entry.bytes
        supply = Supply(what, file.path, sha256, is_url(file.path) or path.exists(), entry is not None, advice, size)
        found.setdefault(file.path, supply)

    for job in jobs:
        if job.spec.stage == "shards":
            data = preset.reference_data if job.spec.name == "reference_shards" else preset.data
            ask(f"images ({data.source})" if data else "images", data)
        if job.spec.stage in ("sample", "metrics"):
            ask("prompts of the evaluation", preset.evaluation.prompts)
        if job.spec.stage == "train":
            ask("prompts of the training", preset.prompts)
        if job.spec.stage in ("teacher", "components"):
            ask("teacher's weights", preset.teacher.weights)
        if job.spec.stage == "features":
            ask("feature extractor", preset.features.weights)
        if job.spec.stage == "reference":
            ask("statistics of the real images", preset.features.reference)
        if job.spec.stage == "train":
            ask("VGG-16 of LPIPS", job.spec.need("train").vgg_weights)
        if job.spec.stage == "import":
            ask(f"released student {job.spec.name}", job.spec.weights)
    return list(found.values())


@dataclass(frozen=True)
class NetworkBytes:
    """Sizes of what a run stores."""

    generator: int
    critic: int
    optimizers: int
    average: int

    @property
    def checkpoint(self) -> int:
        """Everything that a resumed run needs."""
        return self.generator + self.critic + self.optimizers + self.average


def disk(plan: Plan, jobs: Iterable[Job], images: int, networks: NetworkBytes) -> dict[str, dict[str, float]]:
    """Bytes by place (`data`, `results`, `state`) and kind; images are taken at their raw size, as an upper bound.

    State folders are emptied at the end of a run: theirs is the room while all runs of `jobs` are in training.
    """
    preset, runtime = plan.preset, plan.preset.runtime
    raw = preset.data.channels * preset.data.resolution**2
    teacher, latent, numbers = preset.teacher, raw, raw
    if isinstance(teacher, DiffusersTeacherConfig):
        numbers = teacher.latent_channels * (preset.data.resolution // teacher.latent_factor) ** 2
        latent = 2 * numbers  # half precision
    room: dict[str, dict[str, float]] = {"data": {}, "results": {}, "state": {}}

    def add(place: str, kind: str, size: float) -> None:
        room[place][kind] = room[place].get(kind, 0.0) + size

    for job in jobs:
        stage = job.spec.stage
        if stage in ("shards", "latents"):
            add("data", stage, images * ((raw if stage == "shards" else latent) + TAR_OVERHEAD))
        elif stage == "pairs":
            add("data", stage, preset.pairs.num_pairs * (2 * 4 * numbers + TAR_OVERHEAD))
        elif stage in ("teacher", "import", "select"):
            add("results", "weights", networks.generator)
        elif stage == "train":
            snapshots = job.spec.need("train").num_snapshots * networks.generator
            add("results", "weights", 2 * networks.generator + networks.critic)
            add("results", "snapshots", snapshots)
            add("state", "snapshots", snapshots)
            add("state", "checkpoints", (runtime.keep_checkpoints + CHECKPOINTS) * networks.checkpoint)
        elif stage == "sample":
            evaluation = preset.evaluation
            shown = evaluation.num_shown if evaluation.streamed else evaluation.num_samples * evaluation.num_blocks
            add("results", "samples", shown * (raw + TAR_OVERHEAD))
    return room
