"""Stages that write shards: images, latents, noise-image pairs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dmd2.config import Runtime
from dmd2.datasets import write_images
from dmd2.datasets.latents import write_latents, write_pairs
from dmd2.datasets.loader import EpochStream, PairBatch
from dmd2.datasets.prompts import load_prompts
from dmd2.datasets.published import adopt
from dmd2.lineage.spec import Spec
from dmd2.method.denoiser import Cond, Teacher, concat, move
from dmd2.progress import Counter
from dmd2.stages.open_weights import checked_record, components_folder, open_teacher
from dmd2.stages.sample import SHARD_TIMEOUT_MINUTES, from_teacher
from dmd2.teachers import load_space
from dmd2.teachers.text_encoder import report_truncated
from dmd2.training import ranks
from dmd2.training.rng import SampleNoise, step_rng


def shards(spec: Spec, manifest: Path, source: str | None, limits: Mapping[str, int], workers: int) -> None:
    """Writes the images and classes of a source as shards; `source` is its path, if it has one.

    `limits` are the keys `max_unreadable` and `max_passed_over` of the data set. If `source` is the
    manifest of shards that were made elsewhere, they are used where they are.
    """
    data = spec.need("data").model_copy(update={"path": source, **limits})
    if source is not None and data.is_made:
        adopt(manifest, source, spec)
        return
    write_images(manifest, data, spec, workers=workers, progress=lambda total: Counter("shards", total))


def latents(spec: Spec, images: Path, manifest: Path, runtime: Runtime, components: Path | None = None) -> None:
    """Writes the images encoded in the teacher's space, with the tokens of their labels; each rank writes its share."""
    device = ranks.device_of(runtime.device)
    folder = None if components is None else components_folder(components, spec.upstream["components"])
    codec, conditioner = load_space(spec.need("teacher"), spec.need("data"), components=folder)
    with ranks.process_group(device, SHARD_TIMEOUT_MINUTES):
        write_latents(
            images,
            manifest,
            codec.to(device),
            conditioner,
            spec,
            images_digest=spec.upstream["shards"],
            batch_size=runtime.sample_batch_size,
            rank=ranks.rank(),
            world=ranks.world_size(),
            barrier=ranks.barrier,
            progress=Counter("latents"),
        )


def pairs(spec: Spec, weights: Path, manifest: Path, runtime: Runtime, components: Path | None = None) -> None:
    """Writes noise-image pairs of the teacher's deterministic sampler; each rank writes its share of the shards."""
    settings, sampler = spec.need("pairs"), spec.need("sampler")
    device = ranks.device_of(runtime.device)
    teacher = open_teacher(spec, weights, components=components).to(device)
    teacher.denoiser.precision = sampler.precision
    record = checked_record(weights, spec.upstream["teacher"])

    def make(ids: range) -> PairBatch:
        tokens = _pair_tokens(spec, teacher, ids)
        cond = teacher.conditioner.embed(move(tokens, device))
        noise = SampleNoise(settings.seed, ids, teacher.sample_shape, device)
        start = SampleNoise(settings.seed, ids, teacher.sample_shape, device)()
        x0 = from_teacher(spec, teacher, cond, noise, sampler)
        return PairBatch(start.cpu(), x0.cpu(), tokens)

    with ranks.process_group(device, SHARD_TIMEOUT_MINUTES):
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
    report_truncated(teacher.conditioner, "pairs")


def _pair_tokens(spec: Spec, teacher: Teacher, ids: range) -> Cond:
    """The tokens of the pairs `ids`: of random classes, or of the training prompts in an order shuffled by the seed."""
    seed = spec.need("pairs").seed
    if spec.prompts is None:
        drawn = [teacher.conditioner.draw(1, step_rng(seed, i, rank=1)) for i in ids]
        return concat([tokens for tokens in drawn if tokens is not None])
    prompts = load_prompts(spec.prompts)
    chosen = EpochStream(len(prompts), seed).ids(ids.start, ids.stop)
    return teacher.conditioner.tokenize([prompts[i] for i in chosen])
