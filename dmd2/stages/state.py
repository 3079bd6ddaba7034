"""The state folder of a training: which one is its own, and whether its disk has room."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from dmd2.checkpoint import CheckpointStore
from dmd2.config import Runtime, Train
from dmd2.datasets.shards import content_id, read_manifest
from dmd2.fitting import log
from dmd2.records import read_record, sha256
from dmd2.spec import Spec
from dmd2.stages.room import check_room, checkpoint_bytes, held_bytes, weights_bytes
from dmd2.teacher_training import TeacherFit
from dmd2.training import Distillation


def state_store(root: Path, spec: Spec, runtime: Runtime, read: Mapping[str, str]) -> CheckpointStore:
    """The state folder of a training: named by its spec and by checksums of what it `read`s.

    A spec says how its inputs are made; the checksums say what they are. Where an input's content changes under the
    same spec (images were added to a data set's folder) the training starts anew, in another folder.
    """
    text = json.dumps([spec.digest, dict(read)], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return CheckpointStore(
        root / f"{spec.name}-{digest}",
        digest,
        keep=runtime.keep_checkpoints,
        warn=log,
        in_background=runtime.async_checkpoints,
        patience_minutes=runtime.collective_timeout_minutes,
    )


def checksums(
    spec: Spec, teacher_weights: Path, latents: Path, pairs: Path | None, start: Path | None
) -> dict[str, str]:
    """What a student's training reads, by checksum."""
    read = {
        "teacher": _recorded(teacher_weights),
        "latents": content_id(read_manifest(latents, spec.upstream["latents"])),
    }
    if pairs is not None:
        read["pairs"] = content_id(read_manifest(pairs, spec.upstream["pairs"]))
    if start is not None:
        read["start"] = _recorded(start)
    train: Train = spec.need("train")
    if train.vgg_weights is not None and train.regression_weight > 0 and train.regression_loss == "lpips":
        read["vgg"] = train.vgg_weights.sha256 or sha256(train.vgg_weights.path)
    return read


def _recorded(weights: Path) -> str:
    """The SHA-256 in a weight file's record, which who opens the file compares."""
    return str(read_record(weights, verify=False)["sha256"])


def check_students_room(run: Distillation, state: Path, out: Path, runtime: Runtime) -> None:
    """Raises UserError if checkpoints, snapshots and results of a student do not fit on their disks."""
    networks = [run.generator, run.critic]
    checkpoint = checkpoint_bytes(networks, run.generator if run.train.ema_decay else None)
    snapshots = run.train.num_snapshots * weights_bytes(run.generator)
    results = weights_bytes(run.generator) + sum(map(weights_bytes, networks))
    check_room({state: _more(state, checkpoint, runtime, snapshots), out: results + snapshots})


def check_teachers_room(fit: TeacherFit, state: Path, out: Path, runtime: Runtime) -> None:
    """Raises UserError if checkpoints and weights of a teacher do not fit on their disks."""
    checkpoint = checkpoint_bytes([fit.network], fit.network)
    check_room({state: _more(state, checkpoint, runtime), out: weights_bytes(fit.network)})


def _more(state: Path, checkpoint: int, runtime: Runtime, snapshots: int = 0) -> int:
    """What a state folder will take beside what an earlier attempt left there: one checkpoint more than are kept."""
    return max(0, (runtime.keep_checkpoints + 1) * checkpoint + snapshots - held_bytes(state))
