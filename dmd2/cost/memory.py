"""The memory that a training step needs on a device, measured on a dry run with meta tensors.

Every storage that the step makes is followed from its birth to its death, so the peaks hold what is kept for the
backward pass, gradients and short-lived values. What is alive at a moment is linear in the samples that pass at a
time, so a peak is the largest of lines: between measured sizes its chord is above it. What an allocator adds
(rounding, fragmentation, workspaces of libraries) is not in it.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dmd2 import config
from dmd2.cost.meta_run import meta_networks, meta_run, meta_tensors
from dmd2.cost.observed_ops import OpObserver
from dmd2.cost.step_parts import CRITIC_TURN, GENERATOR_TURN, OPTIMIZERS, observed
from dmd2.method.distillation import Distillation
from dmd2.training.sharding import blocks
from dmd2_kernels import use

GIB = 2**30
SIZES = (1, 6, 36)
"""Samples passed at a time in the measurements; beyond the last the last chord is extended."""


class LiveBytes(OpObserver):
    """The bytes of all storages that operations in the block have made and that are still alive, and their peaks.

    An observer of `step_parts.observed`: `peaks` has the highest value from the begin of a part to that of the next.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peaks: dict[str, int] = defaultdict(int)
        self._part = "before"
        self._alive: dict[int, Any] = {}  # by the storage's address: a reference that says when it is freed

    def hold(self, *networks: nn.Module) -> None:
        """Counts networks that were made before."""
        for network in networks:
            for tensor in (*network.parameters(), *network.buffers()):
                self._made(tensor.untyped_storage())

    def saw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """See `OpObserver`."""
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._made(leaf.untyped_storage())

    def _made(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._alive:
            return
        size = storage.nbytes()

        def freed(_: Any) -> None:
            del self._alive[address]
            self.now -= size

        self._alive[address] = weakref.ref(storage, freed)
        self.now += size
        if self.now > self.peaks[self._part]:
            self.peaks[self._part] = self.now

    def begin(self, part: str) -> None:
        """See `step_parts.Observer`."""
        self._part = part
        self.peaks[part] = max(self.peaks[part], self.now)

    def end(self, part: str) -> None:
        """See `step_parts.Observer`."""


@dataclass(frozen=True)
class State:
    """Bytes that are on a device throughout, by what they are for."""

    generator: int
    critic: int
    teacher: int
    optimizers: int
    average: int
    generator_gradients: int  # not in the total: of the generator's turn alone
    critic_gradients: int  # of the critic's
    largest_unit: int  # not in the total: of the parts that a sharded layout gathers one by one

    @property
    def total(self) -> int:
        """All of them."""
        return self.generator + self.critic + self.teacher + self.optimizers + self.average


@dataclass(frozen=True)
class Turn:
    """The most that a part of a step has beside the state, in bytes, at some numbers of samples passed at a time."""

    points: tuple[tuple[int, float], ...]  # (samples, bytes), ascending

    def at(self, samples: int) -> float:
        """Bytes with `samples` at a time."""
        chords = list(pairwise(self.points))
        (low, at_low), (high, at_high) = next((chord for chord in chords if samples <= chord[1][0]), chords[-1])
        return at_low + (at_high - at_low) * (samples - low) / (high - low)

    def plus(self, size: float) -> Turn:
        """The same with `size` bytes more, but not less than none."""
        return Turn(tuple((samples, max(found + size, 0.0)) for samples, found in self.points))


@dataclass(frozen=True)
class Memory:
    """A training step's memory on one device with whole networks."""

    state: State
    turns: Mapping[str, Turn]  # by part of a step

    def turn(self, parts: tuple[str, ...], samples: int) -> float:
        """The highest of `parts`, with `samples` at a time."""
        return max(self.turns[part].at(samples) for part in parts if part in self.turns)

    def generator_turn(self, samples: int) -> float:
        """Gradients, kept activations and short-lived values of the generator's turn."""
        return self.turn(GENERATOR_TURN, samples)

    def critic_turn(self, samples: int) -> float:
        """The same of the critic's turn, and of the updates."""
        return self.turn((*CRITIC_TURN, OPTIMIZERS), samples)

    def peak(self, samples: int) -> float:
        """The most that is alive at any time."""
        return self.state.total + max(self.generator_turn(samples), self.critic_turn(samples))


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of tensors that share no memory."""
    return sum(t.numel() * t.element_size() for t in tensors)


def state_of(run: Distillation, train: config.Train) -> State:
    """What is there throughout: weights, two moments of AdamW for each trained parameter, and the averages."""
    weights = {
        name: num_bytes((*network.parameters(), *network.buffers()))
        for name, network in (("generator", run.generator), ("critic", run.critic), ("teacher", run.teacher.denoiser))
    }
    trained = [[p for p in network.parameters() if p.requires_grad] for network in (run.generator, run.critic)]
    gradients = [num_bytes(params) for params in trained]
    counts = sum(map(len, trained)) * torch.float32.itemsize  # AdamW's count of steps beside each tensor
    return State(
        **weights,
        optimizers=2 * sum(gradients) + counts,
        average=weights["generator"] * ((train.ema_decay > 0) + len(train.ema_lengths or ())),
        generator_gradients=gradients[0],
        critic_gradients=gradients[1],
        largest_unit=max(num_bytes(block.parameters()) for block in blocks(run.generator)),
    )


def sizes_around(samples: int) -> tuple[int, int]:
    """The two of `SIZES` whose measurements tell the memory with `samples` at a time."""
    return next((pair for pair in pairwise(SIZES) if samples <= pair[1]), SIZES[-2:])


def measure_memory(
    teacher: config.AnyTeacher,
    data: config.Data,
    train: config.Train,
    *,
    parts: int = 1,
    recompute: bool = False,
    sizes: Sequence[int] = SIZES,
    kernels: str = "triton",
) -> Memory:
    """The memory of a run's step that passes its batch in `parts`, with the kernels that a GPU uses.

    With `recompute` the trained networks keep their blocks' inputs alone (`Runtime.activation_checkpointing`).
    """
    found = [_measured(teacher, data, train, parts, recompute, samples, kernels) for samples in sizes]
    state = found[0][0]
    names = dict.fromkeys(name for _, peaks in found for name in peaks)
    turns = {
        name: Turn(tuple((n, float(peaks[name] - state.total)) for n, (_, peaks) in zip(sizes, found, strict=True)))
        for name in names
    }
    return Memory(state, turns)


@cache
def _measured(
    teacher: config.AnyTeacher,
    data: config.Data,
    train: config.Train,
    parts: int,
    recompute: bool,
    samples: int,
    kernels: str,
) -> tuple[State, dict[str, int]]:
    """The state, and the peaks by part of a step, with `samples` at a time."""
    built, copies = meta_networks(teacher, data)
    batch, live = train.model_copy(update={"batch_size": samples * parts}), LiveBytes()
    live.hold(built.denoiser, *copies)
    with meta_tensors(), use(kernels), live:
        run = meta_run(built, batch, copies, micro_batch_size=samples)
        for network in (run.generator, run.critic.fake, run.teacher.denoiser):
            network.prepare(activation_checkpointing=recompute)
        peaks_of_step(run, live)
        return state_of(run, train), live.peaks


def peaks_of_step(run: Distillation, live: LiveBytes) -> None:
    """Takes the peaks by part of a step that moves both networks, or of two where their turns are disjoint."""
    with observed(run, live):
        for index in (0, 1) if run.train.turns == "disjoint" else (0,):
            run.step(index)
