"""The stage that samples from a teacher or student, and the sampling functions of all stages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmd2.config import DiffusersTeacherConfig, Evaluation, Runtime, Sampler
from dmd2.config.protocols import PROTOCOLS, Protocol
from dmd2.datasets import write_shards
from dmd2.datasets.prompts import load_prompts
from dmd2.lineage.spec import Spec
from dmd2.method import sampling, schedulers
from dmd2.method.denoiser import Cond, Teacher, move
from dmd2.metrics.images import Images, Labels
from dmd2.progress import Counter
from dmd2.report.table_schema import TRAINING
from dmd2.stages.batches import num_cut
from dmd2.stages.open_weights import checked_record, open_teacher
from dmd2.teachers.text_encoder import TextConditioner
from dmd2.training import ranks
from dmd2.training.rng import SampleNoise

log = logging.getLogger(__name__)
SHARD = 4096
"""Samples per shard of generated images."""
SHARD_TIMEOUT_MINUTES = 24 * 60.0
"""Timeout of collective calls: ranks may be a shard apart, which takes a many-step teacher most of an hour."""


def open_model(
    spec: Spec, weights: Path, sampler: Sampler, device: torch.device, components: Path | None = None
) -> Teacher:
    """Loads an entry's model on `device`, with the sampler's precision."""
    model = open_teacher(spec, weights, upstream="model", components=components).to(device)
    model.denoiser.precision = sampler.precision
    if _protocol(spec).first_tokenizer and isinstance(model.conditioner, TextConditioner):
        model.conditioner.use_first_tokenizer()
    return model


def _protocol(spec: Spec) -> Protocol:
    """The first protocol; the others sample as it does (checked in the configuration)."""
    return PROTOCOLS[(spec.evaluation or Evaluation()).protocols[0]]


@contextmanager
def tensor_float_32(allowed: bool) -> Iterator[None]:
    """Allows TensorFloat-32 in products and convolutions on GPUs; if it is not allowed, torch's settings stay."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    if allowed:
        matmul.allow_tf32 = cudnn.allow_tf32 = True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def sample_x0(spec: Spec, teacher: Teacher, ids: Sequence[int] | range, sampler: Sampler, seed: int) -> Tensor:
    """Generates the samples `ids`: float32 (len(ids), ...) on the CPU.

    A sample depends on the model, `seed` and its id, not on its batch. Sample i has class (or prompt) i modulo the
    number of classes (prompts).
    """
    device = teacher.grid.sigmas.device
    noise = SampleNoise(seed, list(ids), teacher.sample_shape, device)
    return samples(spec, teacher, conditions(teacher, labels_of(spec, ids)), noise, sampler).cpu()


def conditions(teacher: Teacher, labels: Labels) -> Cond:
    """The conditions of B classes or prompts, on the teacher's device."""
    return teacher.conditioner.embed(move(teacher.conditioner.tokenize(labels.tolist()), teacher.grid.sigmas.device))


def samples(spec: Spec, teacher: Teacher, cond: Cond, noise: SampleNoise, sampler: Sampler) -> Tensor:
    """Samples of a student or teacher for conditions of B samples: x0 float32 (B, ...) on its device."""
    if sampler.kind == "few_step":
        return from_student(spec, teacher, cond, noise)
    return from_teacher(spec, teacher, cond, noise, sampler)


def from_student(spec: Spec, teacher: Teacher, cond: Cond, noise: SampleNoise) -> Tensor:
    """Samples of a student, whose network is `teacher.denoiser`: x0 float32 (B, ...) on its device.

    A text-to-image student is sampled as the stock pipeline that `dmd2 export` makes of it, bit for bit where stock
    schedulers know its levels; the sampler that it was trained with, `sampling.few_step`, is equal up to rounding.
    """
    train, config = spec.need("train"), spec.need("teacher")
    steps = teacher.grid.student_steps(train.num_steps, train.student_levels)
    from_last = list(steps.levels) == [len(teacher.grid.sigmas) - 1]
    alpha_bar = _protocol(spec).alpha_bar if from_last else None
    if isinstance(config, DiffusersTeacherConfig) and alpha_bar is None:
        from dmd2.teachers.export import has_stock_scheduler, sample_as_stock, student_scheduler  # slow

        if has_stock_scheduler(config, steps.levels):
            network: Any = teacher.denoiser
            scheduler = student_scheduler(config, steps.levels)
            return sample_as_stock(network, cond, scheduler, len(steps.levels), noise(), noise.rngs)
    return sampling.few_step(teacher.denoiser, cond, steps, noise, alpha_bar=alpha_bar)


def from_teacher(spec: Spec, teacher: Teacher, cond: Cond, noise: SampleNoise, sampler: Sampler) -> Tensor:
    """Samples of the teacher for conditions of B samples: x0 float32 (B, ...) on its device."""
    assert sampler.num_steps is not None  # checked in the configuration
    scale = sampler.guidance_scale or 1.0
    null = teacher.conditioner.null(cond) if scale != 1 else None
    if sampler.kind == "diffusers":
        scheduler = scheduler_of(sampler, teacher)
        guidance: dict[str, Any] = {"null": null, "guidance_scale": scale, "rngs": noise.rngs}
        return schedulers.sample_with(scheduler, teacher.denoiser, teacher.grid, cond, noise(), **guidance)
    high = float("inf") if sampler.s_max is None else sampler.s_max
    churn = sampling.Churn(sampler.s_churn, sampler.s_min, high, sampler.s_noise)
    settings: dict[str, Any] = {"rho": spec.need("teacher").rho, "churn": churn, "null": null, "guidance_scale": scale}
    return sampling.heun(teacher.denoiser, cond, teacher.grid, sampler.num_steps, noise, **settings)


def scheduler_of(sampler: Sampler, teacher: Teacher) -> Any:
    """A scheduler of diffusers as configured, for the teacher's noise levels."""
    assert sampler.scheduler is not None  # checked in the configuration
    assert sampler.num_steps is not None
    betas = schedulers.grid_betas(teacher.grid)
    return schedulers.make_scheduler(sampler.scheduler, sampler.num_steps, betas, sampler.options)


def sample_images(
    spec: Spec, teacher: Teacher, ids: Sequence[int] | range, sampler: Sampler, seed: int
) -> list[Images]:
    """Decodes `sample_x0` under each protocol of the spec: one uint8 (len(ids), H, W, C) each, from the same x0."""
    names = spec.need("evaluation").protocols
    with tensor_float_32(_protocol(spec).tf32):
        x0 = sample_x0(spec, teacher, ids, sampler, seed)
        return [teacher.codec.decode(x0, rounding=PROTOCOLS[name].rounding) for name in names]


def maker(
    spec: Spec, teacher: Teacher, sampler: Sampler, batch_size: int, beat: Callable[[], object] = lambda: None
) -> Callable[[range], tuple[list[Images], Labels]]:
    """Returns a function that generates images and labels in batches of `batch_size`; `beat` is called after each."""
    seed = spec.need("evaluation").seed

    def make(ids: range) -> tuple[list[Images], Labels]:
        bounds = [*range(ids.start, ids.stop, batch_size), ids.stop]
        parts = []
        for start, stop in pairwise(bounds):
            parts.append(sample_images(spec, teacher, range(start, stop), sampler, seed))
            beat()
        return [np.concatenate(images) for images in zip(*parts, strict=True)], labels_of(spec, ids)

    return make


def labels_of(spec: Spec, ids: Sequence[int] | range) -> Labels:
    """The classes or prompts of the samples `ids`: number id modulo the number of classes or prompts."""
    if (prompts := spec.need("evaluation").prompts) is None:
        return np.asarray(ids, dtype=np.int64) % spec.need("data").classes
    listed = load_prompts(prompts)
    return np.asarray([listed[i % len(listed)] for i in ids])


def fields_of(protocols: Sequence[str]) -> list[str]:
    """The fields with the images of each protocol: `image.png` for the first, `image_NAME.png` for the others."""
    return ["image.png", *(f"image_{name}.png" for name in protocols[1:])]


def num_passes(spec: Spec, teacher: Teacher, sampler: Sampler) -> int:
    """Network passes per sample: one per step of a student, 2n - 1 for n Heun steps; guidance doubles them."""
    if sampler.num_steps is None:
        return int(spec.need("train").num_steps)
    scale = sampler.guidance_scale or 1.0
    if sampler.kind == "diffusers":
        return schedulers.num_passes(scheduler_of(sampler, teacher), scale)
    return (2 * sampler.num_steps - 1) * (1 if scale == 1 else 2)


def sample(spec: Spec, weights: Path, manifest: Path, runtime: Runtime, components: Path | None = None) -> None:
    """Writes images of a teacher or student as shards; each rank writes its share."""
    evaluation, sampler = spec.need("evaluation"), spec.need("sampler")
    device = ranks.device_of(runtime.device)
    model = open_model(spec, weights, sampler, device, components)
    total = evaluation.num_shown if evaluation.streamed else evaluation.num_samples * evaluation.num_blocks
    fields = fields_of(evaluation.protocols)

    def make(ids: range) -> dict[str, Any]:
        images = sample_images(spec, model, ids, sampler, evaluation.seed)
        return {field: list(pixels) for field, pixels in zip(fields, images, strict=True)} | {
            spec.need("data").label_field: labels_of(spec, ids)
        }

    record = checked_record(weights, spec.upstream["model"])
    with ranks.process_group(device, SHARD_TIMEOUT_MINUTES):
        write_shards(
            manifest,
            total,
            SHARD,
            make,
            spec,
            batch_size=runtime.sample_batch_size,
            inputs=record["sha256"],
            rank=ranks.rank(),
            world=ranks.world_size(),
            barrier=ranks.barrier,
            progress=Counter(f"sampling {spec.name}", total),
            facts=model_facts(spec, model, sampler, record),
        )


def model_facts(spec: Spec, teacher: Teacher, sampler: Sampler, record: dict[str, Any]) -> dict[str, Any]:
    """Facts of samples: the model, the network passes per sample (nfe), and how many prompts are cut, if any."""
    counts = ("run", "iterations", "generator_updates", "checkpoint_step", "selection", "seed")
    selection = {"selection": "last"} if "checkpoint_step" in record else {}
    model = {
        "run": "teacher",
        **selection,
        **{name: record[name] for name in (*counts, *TRAINING) if name in record},
        "sha256": record["sha256"],
        "digest": record["provenance"]["digest"],
    }
    facts = {"nfe": num_passes(spec, teacher, sampler), "model": model}
    if (prompts := spec.need("evaluation").prompts) is not None and (num := num_cut(teacher, load_prompts(prompts))):
        log.warning("prompts: %d of the evaluation's are longer than the tokenizer takes, and are cut", num)
        facts["prompts_cut"] = num
    return facts
