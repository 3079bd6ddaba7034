"""Whether a disk has room for what a training will write, asked before the first iteration and not after a day."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from dmd2.errors import UserError

ADAMW_STATES = 2
"""Tensors of a parameter's size that AdamW keeps beside it."""


def weights_bytes(network: nn.Module) -> int:
    """The size of a network's weights in a file, up to its header."""
    return sum(value.numel() * value.element_size() for value in network.state_dict().values())


def checkpoint_bytes(networks: Sequence[nn.Module], averaged: nn.Module | None) -> int:
    """The size of a checkpoint: the networks in training, their optimizers' state, and an average if one is kept."""
    trained = (p for network in networks for p in network.parameters() if p.requires_grad)
    optimizers = sum(ADAMW_STATES * p.numel() * p.element_size() for p in trained)
    average = weights_bytes(averaged) if averaged is not None else 0
    return sum(map(weights_bytes, networks)) + optimizers + average


def held_bytes(folder: Path) -> int:
    """What the files in a folder take."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_room(needs: Mapping[Path, int]) -> None:
    """Raises UserError if a disk has less room than the bytes that will be written into its folders."""
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
    """The folder, or the nearest one above it that exists."""
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return folder
