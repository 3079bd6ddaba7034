"""What the networks and a training step cost, counted on the step itself without memory or arithmetic.

Counted are the multiplications and additions of convolutions and matrix products (2 per multiply-add), as in the
literature; norms, activations, optimizers and losses are a matter of bytes. F is a pass of the network, E of its
encoder: the released ImageNet-64 recipe takes 4.8 F + 6.4 E an image and iteration at R = 5.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from dmd2 import config
from dmd2.cost.meta_run import meta_batch, meta_run, meta_teacher, meta_tensors
from dmd2.cost.step_parts import PARTS, observed
from dmd2.method import sampling
from dmd2.method.critic import RealismHead
from dmd2.method.distillation import Distillation
from dmd2.metrics.classifier import Classifier
from dmd2_kernels import use

BATCH = 2
"""Samples in a counted batch; counts are per sample and do not depend on it."""

_aten = torch.ops.aten
_FLASH = (
    (_aten._scaled_dot_product_flash_attention_for_cpu, _aten._scaled_dot_product_flash_attention_for_cpu_backward),
    (_aten._scaled_dot_product_flash_attention, _aten._scaled_dot_product_flash_attention_backward),
    (_aten._scaled_dot_product_efficient_attention, _aten._scaled_dot_product_efficient_attention_backward),
    (_aten._scaled_dot_product_cudnn_attention, _aten._scaled_dot_product_cudnn_attention_backward),
)


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Two products: q k^T, and with v."""
    return sdpa_flop_count(q, k, v)


def _attention_backward(_: Any, q: Any, k: Any, v: Any, *__: Any, **___: Any) -> int:
    """Four products: the gradients of both factors of both. A fused kernel forms q k^T again: see `recomputed`."""
    return 2 * sdpa_flop_count(q, k, v)


class FlopCounter:
    """Operations by part of a step; an observer of `passes.observed`."""

    def __init__(self) -> None:
        formulas: dict[Any, Callable[..., int]] = {forward: _attention for forward, _ in _FLASH}
        formulas |= {backward: _attention_backward for _, backward in _FLASH}
        self._counter = FlopCounterMode(display=False, custom_mapping=formulas)
        self._begun = 0
        self.parts: dict[str, int] = defaultdict(int)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts what happens in the block."""
        with self._counter:
            yield

    @property
    def total(self) -> int:
        """Everything counted so far."""
        return self._counter.get_total_flops()

    @property
    def recomputed(self) -> int:
        """What fused attention does on top: the scores again in the backward pass, a quarter of its four products."""
        by_op = self._counter.get_flop_counts().get("Global", {})
        return sum(by_op.get(backward, 0) for _, backward in _FLASH) // 4

    def begin(self, part: str) -> None:
        """See `passes.Observer`."""
        self._begun = self.total

    def end(self, part: str) -> None:
        """See `passes.Observer`."""
        self.parts[part] += self.total - self._begun


@dataclass(frozen=True)
class PassCost:
    """FLOPs of one sample."""

    forward: float  # F
    encoder: float  # E
    head: float  # the realism head on the encoder's output


@dataclass(frozen=True)
class StepCost:
    """FLOPs of one image and iteration, the mean over R iterations, by part."""

    parts: Mapping[str, float] = field(default_factory=dict)
    recomputed: float = 0.0

    @property
    def total(self) -> float:
        """All parts, and the little outside of them."""
        return sum(self.parts.values())


def _counted(function: Callable[[], object]) -> int:
    counter = FlopCounter()
    with counter.counting():
        function()
    return counter.total


def pass_cost(teacher: config.TeacherConfig, data: config.Data) -> PassCost:
    """What a network of this architecture costs."""
    with meta_tensors(), torch.no_grad():
        built = meta_teacher(teacher, data)
        (x, cond), sigma = meta_batch(built, BATCH), torch.ones(BATCH)
        features = built.denoiser.denoise_and_tap(x, sigma, cond, 0)[1]
        head = RealismHead(built.denoiser.feature_shapes[0])
        return PassCost(
            forward=_counted(lambda: built.denoiser(x, sigma, cond)) / BATCH,
            encoder=_counted(lambda: built.denoiser.denoise_and_tap(x, sigma, cond, 0)) / BATCH,
            head=_counted(lambda: head(features[0])) / BATCH,
        )


def step_cost(teacher: config.TeacherConfig, data: config.Data, train: config.Train) -> StepCost:
    """What a step of `train` costs: the mean of an iteration that moves the generator and R - 1 that do not."""
    train = train.model_copy(update={"batch_size": BATCH})
    period = train.critic_steps_per_generator
    with meta_tensors(), use("triton"):  # a fused op is one step here, as it is on a GPU
        run = meta_run(meta_teacher(teacher, data), train)
        iterations = [(0, 1.0)] + ([(1, period - 1.0)] if period > 1 else [])
        # Backward simulation takes k = 0 .. n - 1 steps, all as often: its mean is that of the two ends.
        ends = sorted({0, train.num_steps - 1})
        weighted = [(_iteration(run, i, k), w / len(ends)) for i, w in iterations for k in ends]
    scale = period * BATCH
    names = (*PARTS, "rest")
    parts = {name: sum(parts.get(name, 0) * w for (parts, _), w in weighted) / scale for name in names}
    recomputed = sum(again * w for (_, again), w in weighted) / scale
    return StepCost({name: flops for name, flops in parts.items() if flops}, recomputed)


def _iteration(run: Distillation, index: int, k: int) -> tuple[dict[str, int], int]:
    """FLOPs by part of iteration `index` with `k` simulated steps, and what fused attention does again."""
    counter, simulate = FlopCounter(), sampling.simulate

    def exactly(generator: Any, cond: Any, sigmas: Any, init_scale: float, _: int, noise: Any) -> Any:
        return simulate(generator, cond, sigmas, init_scale, k, noise)

    with patch.object(sampling, "simulate", exactly), observed(run, counter), counter.counting():
        run.step(index)
    rest = counter.total - sum(counter.parts.values())
    return {**counter.parts, "rest": rest}, counter.recomputed


@cache
def inception_cost() -> float:
    """FLOPs of the Inception features of one image, on torchvision's network of that architecture."""
    from torchvision.models import inception_v3

    with meta_tensors(), torch.no_grad():
        network = inception_v3(weights=None, aux_logits=False, init_weights=False).eval()
        x = torch.zeros(1, 3, 299, 299)
        return float(_counted(lambda: network(x)))


def features_cost(features: config.Features, data: config.Data) -> float:
    """FLOPs of the features of one image."""
    if features.kind == "inception":
        return inception_cost()
    with meta_tensors(), torch.no_grad():
        network = Classifier(data.channels, data.resolution, data.num_classes)
        x = torch.zeros(1, data.channels, data.resolution, data.resolution)
        return float(_counted(lambda: network.hidden(x)))
