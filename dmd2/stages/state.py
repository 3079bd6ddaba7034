"""The state folder of a training: its name, and checks of free disk space."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from dmd2.config import Runtime, Train
from dmd2.datasets.shards import content_id, read_manifest
from dmd2.errors import UserError
from dmd2.files import sha256
from dmd2.lineage.records import read_record
from dmd2.lineage.spec import Spec
from dmd2.method.distillation import Distillation
from dmd2.method.teacher_fit import TeacherFit
from dmd2.training.checkpoint_store import CheckpointStore
from dmd2.training.loop import log

ADAMW_STATES = 2
"""AdamW's state tensors per parameter, of the parameter's size."""


def state_store(root: Path, spec: Spec, runtime: Runtime, read: Mapping[str, str]) -> CheckpointStore:
    """The state folder of a training, named by its spec and the checksums `read` of its inputs.

    If an input's content changes under the same spec (images were added to a data set's folder), training starts from
    scratch in another folder.
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
    """Checksums of the inputs of a student's training, by name."""
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
    """The SHA-256 in a weight file's record; it is verified when the file is opened."""
    return str(read_record(weights, verify=False)["sha256"])


def check_students_room(run: Distillation, state: Path, out: Path, runtime: Runtime) -> None:
    """Raises UserError if checkpoints, snapshots and results of a student do not fit on their disks."""
    networks = [run.generator, run.critic]
    checkpoint = checkpoint_bytes(networks, run.generator if run.train.ema_decay else None)
    whole = max(map(weights_bytes, (run.generator, run.critic.fake)))  # adapters are exported as whole networks
    averages = len(run.train.ema_lengths or ())
    checkpoint += averages * weights_bytes(run.generator)
    snapshots = run.train.num_snapshots * whole * (1 + averages)
    results = whole + sum(map(weights_bytes, networks))
    check_room({state: _more(state, checkpoint, runtime, snapshots), out: results + snapshots})


def check_teachers_room(fit: TeacherFit, state: Path, out: Path, runtime: Runtime) -> None:
    """Raises UserError if checkpoints and weights of a teacher do not fit on their disks."""
    checkpoint = checkpoint_bytes([fit.network], fit.network)
    check_room({state: _more(state, checkpoint, runtime), out: weights_bytes(fit.network)})


def _more(state: Path, checkpoint: int, runtime: Runtime, snapshots: int = 0) -> int:
    """Bytes that a state folder needs beyond what an earlier attempt left: one checkpoint more than are kept."""
    return max(0, (runtime.keep_checkpoints + 1) * checkpoint + snapshots - held_bytes(state))


def weights_bytes(network: nn.Module) -> int:
    """The size of a network's weights in a file, in bytes, without its header."""
    return sum(value.numel() * value.element_size() for value in network.state_dict().values())


def checkpoint_bytes(networks: Sequence[nn.Module], averaged: nn.Module | None) -> int:
    """The size of a checkpoint in bytes: trained networks, their optimizers' state, and the EMA if there is one."""
    trained = (p for network in networks for p in network.parameters() if p.requires_grad)
    optimizers = sum(ADAMW_STATES * p.numel() * p.element_size() for p in trained)
    average = weights_bytes(averaged) if averaged is not None else 0
    return sum(map(weights_bytes, networks)) + optimizers + average


def held_bytes(folder: Path) -> int:
    """The total size of the files below a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_room(needs: Mapping[Path, int]) -> None:
    """Raises UserError if a disk has less free space than the bytes that will be written to its folders."""
    folders = defaultdict(list)
    for folder in needs:
        folders[os.stat(_existing(folder)).st_dev].append(folder)
    for together in folders.values():
        missing = sum(needs[folder] for folder in together)
        free = shutil.disk_usage(_existing(together[0])).free
        if missing > free:
            raise UserError(
                f"{' and '.join(map(str, together))}: {missing / 2**30:.2f} GiB will be written and "
                f"{free / 2**30:.2f} GiB are free; free space, or lower runtime.keep_checkpoints or train.num_snapshots"
            )


def _existing(folder: Path) -> Path:
    """The folder, or its nearest existing parent."""
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return folder
