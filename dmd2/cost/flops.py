"""FLOPs of the networks and of a training step, counted on a dry run of the step with meta tensors.

Counted are the multiplications and additions of convolutions and matrix products (2 per multiply-add), as in the
literature; norms, activations, optimizers and losses are a matter of bytes. F is a pass of the network, E of its
encoder: the released ImageNet-64 recipe takes 4.8 F + 6.4 E an image and iteration at R = 5.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from dmd2 import config
from dmd2.cost.meta_run import meta_batch, meta_networks, meta_run, meta_tensors
from dmd2.cost.observed_ops import OpObserver
from dmd2.cost.step_parts import PARTS, observed
from dmd2.method import sampling
from dmd2.method.critic import RealismHead
from dmd2.method.distillation import Distillation
from dmd2.metrics.classifier import Classifier
from dmd2_kernels import use

BATCH = 6
"""Samples in a counted batch; counts are per sample and do not depend on it. One of `memory.SIZES`, so that shapes are
inferred once for both."""

_aten = torch.ops.aten
_FLASH = (
    (_aten._scaled_dot_product_flash_attention_for_cpu, _aten._scaled_dot_product_flash_attention_for_cpu_backward),
    (_aten._scaled_dot_product_flash_attention, _aten._scaled_dot_product_flash_attention_backward),
    (_aten._scaled_dot_product_efficient_attention, _aten._scaled_dot_product_efficient_attention_backward),
    (_aten._scaled_dot_product_cudnn_attention, _aten._scaled_dot_product_cudnn_attention_backward),
)


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Two products: q k^T, and with v."""
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward(_: Any, q: Any, k: Any, v: Any, *__: Any, **___: Any) -> int:
    """Four products: the gradients of both factors of both. A fused kernel forms q k^T again: see `recomputed`."""
    return 2 * sdpa_flop_count(q.shape, k.shape, v.shape)


_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    **{forward: _attention for forward, _ in _FLASH},
    **{backward: _attention_backward for _, backward in _FLASH},
}


class FlopCounter(OpObserver):
    """Counts operations while it is entered, by part of a step; an observer of `step_parts.observed`.

    torch's `FlopCounterMode` without its attribution to modules, which doubles the time of a count.
    """

    def __init__(self) -> None:
        super().__init__()
        self._begun = 0
        self.total = 0
        self.recomputed = 0
        """What fused attention does on top: the scores again in the backward pass, a quarter of its four products."""
        self.parts: dict[str, int] = defaultdict(int)

    def saw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """See `OpObserver`."""
        if (formula := _FORMULAS.get(func.overloadpacket)) is not None:
            flops = formula(*args, **kwargs, out_val=out)
            self.total += flops
            self.recomputed += flops // 4 if formula is _attention_backward else 0

    def begin(self, part: str) -> None:
        """See `step_parts.Observer`."""
        self._begun = self.total

    def end(self, part: str) -> None:
        """See `step_parts.Observer`."""
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
    with FlopCounter() as counter:
        function()
    return counter.total


def pass_cost(teacher: config.AnyTeacher, data: config.Data) -> PassCost:
    """FLOPs of a network of this architecture."""
    built, _ = meta_networks(teacher, data)
    with meta_tensors(), torch.no_grad():
        (x, tokens), sigma = meta_batch(built, BATCH), torch.ones(BATCH)
        cond = built.conditioner.embed(tokens)
        features = built.denoiser.denoise_and_tap(x, sigma, cond, 0)[1]
        head = RealismHead(built.denoiser.feature_shapes[0])
        return PassCost(
            forward=_counted(lambda: built.denoiser(x, sigma, cond)) / BATCH,
            encoder=_counted(lambda: built.denoiser.denoise_and_tap(x, sigma, cond, 0)) / BATCH,
            head=_counted(lambda: head(features[0])) / BATCH,
        )


def same_operations(train: config.Train) -> config.Train:
    """The run with what does not change the operations of an iteration, such as learning rates, at fixed values.

    Runs for which the results are equal have the same FLOPs and memory. R is 2, so that iteration 0 updates the
    generator and iteration 1 does not.
    """
    numbers = {"iterations", "batch_size", "seed", "num_snapshots", "generator_learning_rate", "init_run"}
    numbers |= {"critic_learning_rate", "betas", "weight_decay", "warmup_iterations", "grad_clip"}
    fixed = {"ema_decay": 0.5 if train.ema_decay else 0, "critic_steps_per_generator": 2}
    return config.Train.model_validate(train.model_dump(exclude=numbers) | fixed)


def step_cost(teacher: config.AnyTeacher, data: config.Data, train: config.Train) -> StepCost:
    """FLOPs of a step of `train`: the mean of an iteration that updates the generator and R - 1 that do not."""
    period = train.critic_steps_per_generator
    with_generator, without = _iterations(teacher, data, same_operations(train))
    weighted = [(counted, 1.0) for counted in with_generator]
    weighted += [(counted, period - 1.0) for counted in without if period > 1]
    scale = period * BATCH * len(with_generator)
    names = (*PARTS, "rest")
    parts = {name: sum(parts.get(name, 0) * w for (parts, _), w in weighted) / scale for name in names}
    recomputed = sum(again * w for (_, again), w in weighted) / scale
    return StepCost({name: flops for name, flops in parts.items() if flops}, recomputed)


Counted = tuple[dict[str, int], int]
"""FLOPs by part of an iteration, and what fused attention does again."""


@cache
def _iterations(
    teacher: config.AnyTeacher, data: config.Data, train: config.Train
) -> tuple[list[Counted], list[Counted]]:
    """The counts of an iteration that updates the generator, and of one that does not.

    Backward simulation takes k = 0 .. n - 1 steps, all as often: its mean is that of the two ends, a count each.
    """
    train = train.model_copy(update={"batch_size": BATCH})
    ends = sorted({0, train.num_steps - 1})
    built, copies = meta_networks(teacher, data)
    with meta_tensors(), use("triton"):  # a fused op is one step here, as it is on a GPU
        run = meta_run(built, train, copies)
        return [_iteration(run, 0, k) for k in ends], [_iteration(run, 1, k) for k in ends]


def _iteration(run: Distillation, index: int, k: int) -> Counted:
    """The counts of iteration `index` with `k` simulated steps."""
    counter, simulate = FlopCounter(), sampling.simulate

    def exactly(generator: Any, cond: Any, steps: Any, _: int, noise: Any) -> Any:
        return simulate(generator, cond, steps, k, noise)

    with patch.object(sampling, "simulate", exactly), observed(run, counter), counter:
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
        network = Classifier(data.channels, data.resolution, data.num_classes or 20)  # pairs: ten digits on two sides
        x = torch.zeros(1, data.channels, data.resolution, data.resolution)
        return float(_counted(lambda: network.hidden(x)))
