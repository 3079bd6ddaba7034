"""Stages that write shards: images, latents, noise-image pairs."""

from __future__ import annotations

from pathlib import Path

from dmd2.config import Runtime
from dmd2.datasets import write_images
from dmd2.datasets.latents import write_latents, write_pairs
from dmd2.datasets.loader import PairBatch
from dmd2.lineage.spec import Spec
from dmd2.method import sampling
from dmd2.method.denoiser import concat, move
from dmd2.progress import Counter
from dmd2.stages.open_weights import checked_record, open_teacher
from dmd2.stages.sample import APART_MINUTES
from dmd2.teachers import load_space
from dmd2.training import ranks
from dmd2.training.rng import SampleNoise, step_rng


def shards(spec: Spec, manifest: Path, source: str | None, max_unreadable: int, workers: int) -> None:
    """Writes the images and classes of a source as shards; `source` is its path, if it has one."""
    data = spec.need("data").model_copy(update={"path": source, "max_unreadable": max_unreadable})
    write_images(manifest, data, spec, workers=workers, progress=lambda total: Counter("shards", total))


def latents(spec: Spec, images: Path, manifest: Path, runtime: Runtime) -> None:
    """Writes the images encoded in the teacher's space (pixels for a pixel teacher), with the teacher's conditions."""
    codec, conditioner = load_space(spec.need("teacher"), spec.need("data"))
    write_latents(
        images,
        manifest,
        codec,
        conditioner,
        spec,
        images_digest=spec.upstream["shards"],
        batch_size=runtime.sample_batch_size,
        progress=Counter("latents"),
    )


def pairs(spec: Spec, weights: Path, manifest: Path, runtime: Runtime) -> None:
    """Writes noise-image pairs of the teacher's deterministic sampler; each rank writes its share of the shards."""
    settings, sampler = spec.need("pairs"), spec.need("sampler")
    device = ranks.device_of(runtime.device)
    teacher = open_teacher(spec, weights).to(device)
    teacher.denoiser.precision = sampler.precision
    record = checked_record(weights, spec.upstream["teacher"])

    def make(ids: range) -> PairBatch:
        noise = SampleNoise(settings.seed, ids, teacher.sample_shape, device)()
        cond = concat([teacher.conditioner.draw(1, step_rng(settings.seed, i, rank=1)) for i in ids])
        x0 = sampling.heun(
            teacher.denoiser,
            move(cond, device),
            teacher.grid,
            sampler.num_steps,
            lambda: noise,
            rho=spec.need("teacher").rho,
        )
        return PairBatch(noise.cpu(), x0.cpu(), cond)

    with ranks.process_group(device, APART_MINUTES):
        write_pairs(
            manifest,
            settings.num_pairs,
            make,
            spec,
            shard_size=settings.shard_size,
            batch_size=runtime.sample_batch_size,
            inputs=record["sha256"],
            rank=ranks.rank(),
            world=ranks.world_size(),
            barrier=ranks.barrier,
            progress=Counter("pairs", settings.num_pairs),
        )
