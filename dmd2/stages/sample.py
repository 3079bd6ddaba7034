"""The stage that samples, from a teacher or a student."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmd2 import distributed, sampling
from dmd2.config import Runtime, Sampler
from dmd2.datasets import write_shards
from dmd2.denoiser import Teacher, move
from dmd2.noise import SampleNoise
from dmd2.progress import Counter
from dmd2.protocols import PROTOCOLS
from dmd2.spec import Spec
from dmd2.stages.weights import checked_record, open_teacher

SHARD = 4096
"""Samples in one shard of generated images."""


def sample_images(spec: Spec, teacher: Teacher, ids: Sequence[int] | range, sampler: Sampler, seed: int) -> np.ndarray:
    """The images of the samples `ids`: each a function of the model, `seed` and its id, in whatever batch it is made.

    Sample i has class i modulo the number of classes. Returns uint8 (len(ids), H, W, C).
    """
    device = teacher.grid.sigmas.device
    noise = SampleNoise(seed, list(ids), teacher.sample_shape, device)
    cond = move(teacher.conditioner.encode(labels_of(spec, ids).tolist()), device)
    if sampler.kind == "few_step":
        sigmas = teacher.grid.student_steps(spec.need("train").num_steps)
        x0 = sampling.few_step(teacher.denoiser, cond, sigmas, teacher.grid.init_scale, noise)
    else:
        high = float("inf") if sampler.s_max is None else sampler.s_max
        churn = sampling.Churn(sampler.s_churn, sampler.s_min, high, sampler.s_noise)
        assert sampler.num_steps is not None
        rho = spec.need("teacher").rho
        x0 = sampling.heun(teacher.denoiser, cond, teacher.grid, sampler.num_steps, noise, rho=rho, churn=churn)
    return teacher.codec.decode(x0.cpu(), rounding=PROTOCOLS[spec.need("evaluation").protocols[0]].rounding)


def labels_of(spec: Spec, ids: Sequence[int] | range) -> np.ndarray:
    """The classes of the samples `ids`: equal shares, in turn."""
    return np.asarray(ids, dtype=np.int64) % spec.need("data").num_classes


def num_passes(spec: Spec, sampler: Sampler) -> int:
    """Network passes per sample: 2n - 1 for n Heun steps, one per step of a student."""
    return spec.need("train").num_steps if sampler.num_steps is None else 2 * sampler.num_steps - 1


def sample(spec: Spec, weights: Path, manifest: Path, runtime: Runtime) -> None:
    """Images of a teacher or student as shards; each rank makes its share."""
    evaluation, sampler = spec.need("evaluation"), spec.need("sampler")
    device = distributed.device_of(runtime.device)
    model = open_teacher(spec, weights, upstream="model").to(device)
    total = evaluation.num_samples * evaluation.num_blocks

    def make(ids: range) -> dict[str, Any]:
        images = sample_images(spec, model, ids, sampler, evaluation.seed)
        return {"image.png": list(images), "cls": labels_of(spec, ids)}

    record = checked_record(weights, spec.upstream["model"])
    with distributed.process_group(device):
        write_shards(
            manifest,
            total,
            SHARD,
            make,
            spec,
            batch_size=runtime.sample_batch_size,
            inputs=record["sha256"],
            rank=distributed.rank(),
            world=distributed.world_size(),
            barrier=distributed.barrier,
            progress=Counter(f"sampling {spec.name}", total),
            facts={"nfe": num_passes(spec, sampler), "model": model_facts(record)},
        )


def model_facts(record: dict[str, Any]) -> dict[str, Any]:
    """What a table says of the model behind a set of samples."""
    counts = ("run", "iterations", "generator_updates", "checkpoint_step", "seed")
    seconds = ("train_wall_s", "train_cpu_s", "gpu_s")
    return {
        "run": "teacher",
        **{name: record[name] for name in (*counts, *seconds) if name in record},
        "sha256": record["sha256"],
        "digest": record["provenance"]["digest"],
    }
