"""Stages that measure: the feature extractor, the real images' statistics, metrics of samples."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dmd2.config import Evaluation, Runtime
from dmd2.config.protocols import PROTOCOLS, describe
from dmd2.datasets import ShardReader, read_manifest
from dmd2.files import atomic, check_sha256, sha256, write_json
from dmd2.lineage.records import provenance, read_record, write_record
from dmd2.lineage.spec import Spec
from dmd2.metrics import (
    Extractor,
    Meter,
    Reference,
    Tally,
    chosen,
    load_extractor,
    measure_blocks,
    read_published,
    resample_floor,
    summary,
    tally_range,
    train_classifier,
)
from dmd2.metrics.images import Images, Labels
from dmd2.progress import Counter
from dmd2.stages.open_weights import checked_record
from dmd2.stages.resumable import ResumableFiles, patience
from dmd2.stages.sample import fields_of, maker, model_facts, open_model
from dmd2.teachers.text_encoder import report_truncated
from dmd2.training import ranks
from dmd2.training.checkpoint_store import save_weights

CHUNK = 2048
"""Samples per file of intermediate statistics in a streamed evaluation: the most work that a kill can lose."""


def read_images(spec: Spec, manifest: Path) -> tuple[Images, Labels]:
    """All images (N, H, W, C) uint8 and labels (N,), classes or captions, of the shards of a spec."""
    digest, label = spec.upstream["shards"], spec.need("data").label_field
    content = ShardReader(manifest, digest).read(range(read_manifest(manifest, digest)["num_samples"]))
    return content["image"], content[label]


def features(spec: Spec, images: Path | None, weights: Path) -> None:
    """Writes the feature extractor of the Frechet distance: trained on the data, or a copy of the user's file."""
    config, data = spec.need("features"), spec.need("data")
    facts: dict[str, Any] = {"origin": "file"}
    if config.weights is not None:
        check_sha256(config.weights.path, config.weights.sha256)
        with atomic(weights) as temporary:
            shutil.copyfile(config.weights.path, temporary)
        load_extractor(config, data, weights)
    else:
        assert images is not None  # the rule passes them for a trained extractor
        pixels, labels = read_images(spec, images)
        state, facts = train_classifier(pixels, labels, config, data)
        save_weights(weights, state)
    write_record(weights, spec, **{"kind": config.kind, **facts})


def reference(spec: Spec, images: Path, extractor_weights: Path, out: Path, runtime: Runtime) -> None:
    """Writes statistics of the real images; moments of their features come from a published file if configured.

    Runs on rank 0 only.
    """
    if ranks.rank() > 0:
        return
    reader, device = ShardReader(images, spec.upstream["shards"]), ranks.device_of(runtime.device)
    extractor = open_extractor(spec, extractor_weights, runtime, device)
    file, published = spec.need("features").reference, None
    if file is not None:
        check_sha256(file.path, file.sha256)
        origin = f"{Path(file.path).name} {sha256(file.path)[:12]}"
        published = read_published(file.path, extractor.dim), origin

    data = spec.need("data")
    evaluation = spec.evaluation or Evaluation()
    measures = chosen(evaluation.measures, captions=data.captions is not None)

    def read(ids: Sequence[int] | range | np.ndarray) -> tuple[Images, Labels]:
        content = reader.read(ids, ["image", data.label_field])
        return content["image"], content[data.label_field]

    num = len(reader)
    found = Reference.build(
        read,
        num,
        extractor,
        data.num_classes,
        with_patches="patch_fid" in measures,
        bicubic=PROTOCOLS[evaluation.protocols[0]].bicubic,
        published=published,
        device=device,
        progress=Counter("reference", num),
    )
    if "diversity" in measures:
        found.check_classes()
    found.save(out)
    write_record(out, spec, num_samples=num, moments=found.origin)


def open_extractor(spec: Spec, weights: Path, runtime: Runtime, device: torch.device) -> Extractor:
    """Loads the extractor written by the features stage, with its record checked."""
    checked_record(weights, spec.upstream["features"])
    return load_extractor(spec.need("features"), spec.need("data"), weights, device, runtime.sample_batch_size)


class SampleSource(NamedTuple):
    """What is measured: stored samples, streamed samples of a model's weights, or neither (the floor)."""

    samples: Path | None
    weights: Path | None
    components: Path | None = None


def metrics(
    spec: Spec,
    measured: SampleSource,
    reference: Path,
    extractor_weights: Path,
    state: Path,
    out: Path,
    runtime: Runtime,
) -> None:
    """Writes the metrics record of an entry. Each rank measures its share of a stream; rank 0 writes."""
    evaluation = spec.need("evaluation")
    checked_record(reference, spec.upstream["reference"])
    device, real, shares = ranks.device_of(runtime.device), Reference.load(reference), None
    if measured.samples is not None:
        meter = _meter(spec, real, extractor_weights, runtime, device)
        found, facts = _of_stored(spec, measured.samples, meter)
    elif measured.weights is not None:
        meter = _meter(spec, real, extractor_weights, runtime, device)
        contents = [read_record(path)["sha256"] for path in (measured.weights, reference, extractor_weights)]
        shares = ResumableFiles(state, spec, contents, [_chunk_name(ids) for ids in _chunks(evaluation)])
        found, facts = _of_stream(spec, measured.weights, measured.components, meter, shares, runtime)
    else:
        found = resample_floor(real, evaluation.num_samples, evaluation.num_blocks, evaluation.seed, device, evaluation)
        facts = {"nfe": None, "model": {"run": "data"}}
    if ranks.rank() > 0:
        return
    content = {
        **found,
        **facts,
        "entry": spec.name,
        "seed": evaluation.seed,
        "protocols": describe(evaluation.protocols),
        "features": {"name": spec.need("features").kind, "sha256": sha256(extractor_weights), "reference": real.origin},
        "provenance": provenance(spec),
    }
    write_json(out, content)
    if shares is not None:
        shares.clear()


def _meter(spec: Spec, real: Reference, extractor: Path, runtime: Runtime, device: torch.device) -> Meter:
    evaluation = spec.need("evaluation")
    network = open_extractor(spec, extractor, runtime, device)
    size, protocols = evaluation.num_samples, evaluation.protocols
    return Meter(real, network, size, protocols, device=device, evaluation=evaluation)


def _of_stored(spec: Spec, manifest: Path, meter: Meter) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics of stored samples, read in batches, and facts about the model."""
    reader = ShardReader(manifest, spec.upstream["samples"])
    names = [field.removesuffix(".png") for field in fields_of(meter.protocols)]
    progress, label = Counter(f"metrics {spec.name}", len(reader)), spec.need("data").label_field

    def make(ids: range) -> tuple[list[Images], Labels]:
        content = reader.read(ids, [*names, label])
        progress(len(ids))
        return [content[name] for name in names], content[label]

    found = measure_blocks(meter, make, spec.need("evaluation").num_blocks)
    return found, read_manifest(manifest, spec.upstream["samples"])["facts"]


def _of_stream(
    spec: Spec, weights: Path, components: Path | None, meter: Meter, shares: ResumableFiles, runtime: Runtime
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics of a model's samples, which are generated, measured and discarded, and facts; empty on ranks > 0."""
    evaluation, sampler = spec.need("evaluation"), spec.need("sampler")
    model = open_model(spec, weights, sampler, torch.device(meter.device), components)
    make = maker(spec, model, sampler, runtime.sample_batch_size, shares.beat)
    chunks = _chunks(evaluation)
    progress = Counter(f"metrics {spec.name}", sum(map(len, chunks[ranks.rank() :: ranks.world_size()])))
    for number, path in shares.mine(Tally.load):
        tally_range(meter, make, chunks[number]).save(path)
        progress(len(chunks[number]))
    report_truncated(model.conditioner, f"metrics {spec.name}")
    if ranks.rank() > 0:
        return {}, {}
    shares.wait(patience(runtime), Tally.load)
    size, blocks = evaluation.num_samples, []
    for block in range(evaluation.num_blocks):
        paths = [path for ids, path in zip(chunks, shares.paths, strict=True) if ids.start // size == block]
        blocks.append(meter.measures(reduce(Tally.merge, map(Tally.load, paths))))
    return summary(blocks, size), model_facts(spec, model, sampler, read_record(weights))


def _chunks(evaluation: Evaluation) -> list[range]:
    """The ids of all blocks in chunks of at most CHUNK, each within one block."""
    size = evaluation.num_samples
    starts = range(0, size * evaluation.num_blocks, size)
    return [range(start + part, start + min(part + CHUNK, size)) for start in starts for part in range(0, size, CHUNK)]


def _chunk_name(ids: range) -> str:
    return f"samples-{ids.start:07d}-{ids.stop:07d}.npz"
