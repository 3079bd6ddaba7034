"""The stage that times one image of a teacher or student, and counts its network passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dmd2.config import Runtime
from dmd2.files import write_json
from dmd2.lineage.records import provenance
from dmd2.lineage.spec import Spec
from dmd2.metrics.latency import Part, device_name, measure_latency
from dmd2.stages.sample import conditions, labels_of, num_passes, open_model, samples
from dmd2.training import ranks
from dmd2.training.rng import SampleNoise


def latency(spec: Spec, weights: Path, out: Path, runtime: Runtime, components: Path | None = None) -> None:
    """Writes the seconds that an image takes: batch 1, by text encoder, network and decoder.

    Image i is sample i of the evaluation. The decoder computes in float32. Runs on rank 0 only.
    """
    if ranks.rank() > 0:
        return
    settings, sampler = spec.need("evaluation").latency, spec.need("sampler")
    device = ranks.device_of(runtime.device)
    model = open_model(spec, weights, sampler, device, components)
    precision = model.denoiser.precision = settings.precision or sampler.precision
    seed, counter = spec.need("evaluation").seed, Passes(model.denoiser)

    def text(number: int) -> Any:
        return number, conditions(model, labels_of(spec, [number]))

    def network(given: Any) -> Any:
        counter.images += 1
        number, cond = given
        return samples(spec, model, cond, SampleNoise(seed, [number], model.sample_shape, device), sampler)

    parts: dict[str, Part] = {"text": text, "network": network, "decoder": model.codec.decode}
    found = measure_latency(parts, device, warm_up=settings.warm_up, repeats=settings.repeats)
    content = {
        "seconds": found,
        "passes": counter.mean,
        "nfe": num_passes(spec, model, sampler),
        "device": device_name(device),
        "precision": precision,
        **{key: getattr(settings, key) for key in ("warm_up", "repeats")},
        "entry": spec.name,
        "provenance": provenance(spec),
    }
    write_json(out, content)


class Passes:
    """Counts the samples that pass a network's first layer; two for a guided pass of one image."""

    def __init__(self, network: nn.Module) -> None:
        self.images = self._passes = 0
        leaves = (module for module in network.modules() if not list(module.children()) and list(module.parameters()))
        next(leaves).register_forward_hook(self._count)

    def _count(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        del module, inputs
        self._passes += len(output)

    @property
    def mean(self) -> float:
        """Passes per image."""
        return self._passes / self.images
