"""Stages that measure: the feature extractor, the real images' statistics, metrics of samples and of snapshots."""

from __future__ import annotations

import csv
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmd2 import distributed
from dmd2.checkpoint import save_weights
from dmd2.config import Runtime, Sampler
from dmd2.datasets import ShardReader, read_manifest
from dmd2.metrics import Extractor, Reference, load_extractor, measure, resample_floor, train_classifier
from dmd2.progress import Counter
from dmd2.protocols import PROTOCOLS, describe
from dmd2.records import atomic, provenance, read_json, sha256, write_json, write_record
from dmd2.spec import Spec
from dmd2.stages.sample import labels_of, sample_images
from dmd2.stages.weights import checked_record, open_teacher
from dmd2.teachers.weights import check_sha256

STUDENT = Sampler(kind="few_step")


def read_images(manifest: Path, digest: str) -> tuple[np.ndarray, np.ndarray]:
    """All images (N, H, W, C) uint8 and classes (N,) of a set of shards."""
    content = ShardReader(manifest, digest).read(range(read_manifest(manifest, digest)["num_samples"]))
    return content["image"], content["cls"]


def features(spec: Spec, images: Path, weights: Path) -> None:
    """The feature extractor of the Frechet distance: trained on the data, or a copy of the user's file."""
    config, data = spec.need("features"), spec.need("data")
    facts: dict[str, Any] = {"origin": "file"}
    if config.weights is not None:
        check_sha256(config.weights.path, config.weights.sha256)
        with atomic(weights) as temporary:
            shutil.copyfile(config.weights.path, temporary)
        load_extractor(config, data, weights)
    else:
        pixels, labels = read_images(images, spec.upstream["shards"])
        state, facts = train_classifier(pixels, labels, config, data)
        save_weights(weights, state)
    write_record(weights, spec, **{"kind": config.kind, **facts})


def reference(spec: Spec, images: Path, extractor_weights: Path, out: Path, runtime: Runtime) -> None:
    """Statistics of the real images."""
    pixels, labels = read_images(images, spec.upstream["shards"])
    extractor = _extractor(spec, extractor_weights, distributed.device_of(runtime.device))
    Reference.build(pixels, labels, extractor).save(out)
    write_record(out, spec, num_samples=len(pixels))


def _extractor(spec: Spec, weights: Path, device: torch.device | str = "cpu") -> Extractor:
    checked_record(weights, spec.upstream["features"])
    return load_extractor(spec.need("features"), spec.need("data"), weights, device)


def metrics(
    spec: Spec, samples: Path | None, reference: Path, extractor_weights: Path, out: Path, runtime: Runtime
) -> None:
    """The metrics record of a set of samples; without samples, of resamples of the data (the floor)."""
    evaluation = spec.need("evaluation")
    checked_record(reference, spec.upstream["reference"])
    extractor = _extractor(spec, extractor_weights, distributed.device_of(runtime.device))
    real = Reference.load(reference)
    if samples is None:
        found = resample_floor(real, evaluation.num_samples, evaluation.num_blocks, evaluation.seed)
        facts: dict[str, Any] = {"nfe": None, "model": {"run": "data"}}
    else:
        images, labels = read_images(samples, spec.upstream["samples"])
        found = measure(
            images, labels, real, extractor, evaluation.num_blocks, PROTOCOLS[evaluation.protocols[0]].covariance_start
        )
        facts = read_manifest(samples, spec.upstream["samples"])["facts"]
    content = {
        **found,
        **facts,
        "entry": spec.name,
        "seed": evaluation.seed,
        "protocol": describe(evaluation.protocols)[evaluation.protocols[0]],
        "features": {"name": extractor.name, "sha256": sha256(extractor_weights)},
        "provenance": provenance(spec),
    }
    write_json(out, content)


def curve(spec: Spec, snapshots: Path, reference: Path, extractor_weights: Path, out: Path, runtime: Runtime) -> None:
    """Metrics of a run's snapshots against training, as CSV: paper, figure 9."""
    evaluation, train = spec.need("evaluation"), spec.need("train")
    checked_record(reference, spec.upstream["reference"])
    device = distributed.device_of(runtime.device)
    extractor, real = _extractor(spec, extractor_weights, device), Reference.load(reference)
    listed = read_json(snapshots)["snapshots"]
    bounds = [*range(0, evaluation.curve_samples, runtime.sample_batch_size), evaluation.curve_samples]
    count = Counter(f"curve {spec.name}", len(listed))
    rows = []
    for item in listed:
        model = open_teacher(spec, snapshots.parent / item["file"], upstream="model").to(device)
        parts = [range(start, stop) for start, stop in pairwise(bounds)]
        images = np.concatenate([sample_images(spec, model, ids, STUDENT, evaluation.seed) for ids in parts])
        labels = labels_of(spec, range(evaluation.curve_samples))
        found = measure(images, labels, real, extractor, 1, PROTOCOLS[evaluation.protocols[0]].covariance_start)[
            "metrics"
        ]
        updates = -(-item["step"] // train.critic_steps_per_generator)
        means = {name: value["mean"] for name, value in found.items()}
        rows.append({"step": item["step"], "generator_updates": updates, **means})
        count(1)
    with atomic(out) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    write_record(out, spec, num_samples=evaluation.curve_samples)
