"""What the tests of fitting train, here and in processes of their own that may be killed."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from toy import DIGEST

from dmd2.config import Data, Runtime, Train
from dmd2.datasets import write_shards
from dmd2.datasets.loader import Loader
from dmd2.errors import Interrupted
from dmd2.lineage.spec import Spec
from dmd2.method.denoiser import Cond
from dmd2.method.distillation import Distillation
from dmd2.teachers.mixture import GaussianMixture, mixture_teacher
from dmd2.training import checkpoint_format
from dmd2.training.checkpoint_store import CheckpointStore
from dmd2.training.loop import fit

SHAPE = (1, 2, 2)
BATCH = 8
NUM_SAMPLES = 27  # no multiple of the batch: epochs and batches do not line up
SNAPSHOTS = (10, 20, 30)
RUNTIME = Runtime(log_every=1, checkpoint_every=4, checkpoint_minutes=1000)


def mixture() -> GaussianMixture:
    means = torch.linspace(-0.8, 0.8, 12).view(3, 1, 4)
    return GaussianMixture(means, torch.full((3, 1), 0.2), torch.ones(3, 1))


def write_latents(manifest: Path) -> None:
    """A latent set of `NUM_SAMPLES` samples in shards of 10."""

    def make(ids: range) -> dict[str, Any]:
        rng = np.random.default_rng(ids.start)
        images = rng.uniform(-1, 1, (len(ids), *SHAPE)).astype(np.float32)
        return {"latent.npy": images, "cond.label.npy": np.array([i % 3 for i in ids], np.int64)}

    data = Data(source="digits", resolution=2, channels=1, num_classes=3)
    write_shards(manifest, NUM_SAMPLES, 10, make, Spec.of("latents", "latents", data=data))


class Source:
    """Batches of a latent set, with a diary of what was requested."""

    def __init__(self, manifest: Path, diary: Path | None = None, *, batch: int = BATCH, rank: int = 0, world: int = 1):
        self.loader = Loader(manifest, batch_size=batch // world, seed=1, rank=rank, world=world)
        self.diary = diary

    def __call__(self, index: int) -> tuple[Tensor, Cond]:
        if self.diary is not None:
            with self.diary.open("a") as file:
                file.write(json.dumps([index, self.loader.ids(index).tolist()]) + "\n")
        raw = self.loader.batch(index)
        return torch.from_numpy(raw["latent"]), {"label": torch.from_numpy(raw["cond.label"])}


def distillation(data: Any, **keys: Any) -> Distillation:
    """A two-step student with every part that a checkpoint must hold: GAN, average, regression."""
    usual: dict[str, Any] = {
        "batch_size": BATCH,
        "iterations": 30,
        "num_snapshots": 3,
        "num_steps": 2,
        "critic_steps_per_generator": 3,
        "generator_learning_rate": 1e-3,
        "critic_learning_rate": 1e-3,
        "ema_decay": 0.9,
        "warmup_iterations": 5,
    }
    return Distillation(mixture_teacher(mixture(), SHAPE), Train(**{**usual, **keys}), data=data)


def train(folder: str, manifest: str, pause_s: float = 0.0, ends: str = "") -> None:
    """Fits 30 iterations in `folder`; exits as the command line does on a signal.

    `ends` names a signal that the process sends itself in the middle of writing its third checkpoint.
    """
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, handlers=[logging.FileHandler(Path(folder).with_suffix(".log"))])
    run = distillation(Source(Path(manifest), Path(folder).with_suffix(".ids")))
    step = run.step

    def slow(index: int) -> dict[str, Tensor]:
        time.sleep(pause_s)
        return step(index)

    run.step = slow  # type: ignore[method-assign]
    if ends:
        end_within_a_write(getattr(signal, ends), after=3)
    try:
        with CheckpointStore(folder, DIGEST, warn=logging.getLogger(), in_background=True) as store:
            fit(run, 30, store, RUNTIME, title="test", snapshots=SNAPSHOTS)
    except Interrupted as stop:
        sys.exit(stop.status)


def end_within_a_write(signum: int, after: int) -> None:
    """Sends `signum` to this process from within its `after`-th write, of which SIGKILL leaves half a file."""
    write, count = checkpoint_format.write_part, 0

    def cut(path: Path, part: Any) -> None:
        nonlocal count
        write(path, part)
        count += 1
        if count == after:
            if signum == signal.SIGKILL:
                os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signum)

    checkpoint_format.write_part = cut


def final_state(folder: Path) -> dict[str, Any]:
    """The state in a folder's newest checkpoint."""
    found = CheckpointStore(folder, DIGEST).load()
    assert found is not None
    return found[0]
