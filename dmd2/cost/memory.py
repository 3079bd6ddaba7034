"""What a training step needs of a device's memory, measured on a run without memory.

Every storage that the step makes is followed from its birth to its death, so the peaks hold what is kept for the
backward pass, gradients and short-lived values alike. What is alive at a moment is linear in the samples that pass at a
time, so a peak is the largest of lines: between measured sizes its chord lies above it. What an allocator adds
(rounding, fragmentation, workspaces of libraries) is not in it.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from dmd2 import config
from dmd2.cost.meta_run import meta_run, meta_teacher, meta_tensors
from dmd2.cost.step_parts import CRITIC_TURN, GENERATOR_TURN, OPTIMIZERS, observed
from dmd2.method.distillation import Distillation
from dmd2.training.sharding import blocks
from dmd2_kernels import use

GIB = 2**30
SIZES = (1, 6, 36)
"""Samples passed at a time in the measurements; beyond the last the last chord goes on."""


class LiveBytes(TorchDispatchMode):
    """The bytes of all storages that operations in the block have made and that are still alive, and their peaks.

    An observer of `passes.observed`: `peaks` has the highest value from the begin of a part to that of the next.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peaks: dict[str, int] = defaultdict(int)
        self._part = "before"
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._born(leaf.untyped_storage())
        return out

    def _born(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        weakref.finalize(storage, self._died, size).atexit = False
        self.now += size
        self.peaks[self._part] = max(self.peaks[self._part], self.now)

    def _died(self, size: int) -> None:
        self.now -= size

    def begin(self, part: str) -> None:
        """See `passes.Observer`."""
        self._part = part
        self.peaks[part] = max(self.peaks[part], self.now)

    def end(self, part: str) -> None:
        """See `passes.Observer`."""


@contextmanager
def saved_for_backward() -> Iterator[list[int]]:
    """The bytes of each storage that autograd keeps in the block, parameters left out."""
    sizes: list[int] = []
    known = WeakIdKeyDictionary()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in known and not isinstance(tensor, nn.Parameter):
            known[storage] = True
            sizes.append(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


@dataclass(frozen=True)
class State:
    """Bytes that lie on a device throughout, by what they are for."""

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
    """What lies there throughout: weights, two moments of AdamW for each trained parameter, and the average."""
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
        average=weights["generator"] if train.ema_decay else 0,
        generator_gradients=gradients[0],
        critic_gradients=gradients[1],
        largest_unit=max(num_bytes(block.parameters()) for block in blocks(run.generator)),
    )


def measure_memory(
    teacher: config.TeacherConfig,
    data: config.Data,
    train: config.Train,
    *,
    parts: int = 1,
    recompute: bool = False,
    sizes: Sequence[int] = SIZES,
    kernels: str = "triton",
) -> Memory:
    """The memory of a run's step that passes its batch in `parts`, with the kernels that a GPU takes.

    With `recompute` the trained networks keep their blocks' inputs alone (`Runtime.activation_checkpointing`).
    """

    def measured(samples: int) -> tuple[State, dict[str, int]]:
        batch = train.model_copy(update={"batch_size": samples * parts})
        live = LiveBytes()
        with meta_tensors(), use(kernels), live:
            run = meta_run(meta_teacher(teacher, data), batch, micro_batch_size=samples)
            for network in (run.generator, run.critic.fake, run.teacher.denoiser):
                network.prepare(activation_checkpointing=recompute)
            peaks_of_step(run, live)
            return state_of(run, train), live.peaks

    found = [measured(samples) for samples in sizes]
    state = found[0][0]
    names = dict.fromkeys(name for _, peaks in found for name in peaks)
    turns = {
        name: Turn(tuple((n, float(peaks[name] - state.total)) for n, (_, peaks) in zip(sizes, found, strict=True)))
        for name in names
    }
    return Memory(state, turns)


def peaks_of_step(run: Distillation, live: LiveBytes) -> None:
    """Takes the peaks by part of a step that moves both networks, or of two where their turns are disjoint."""
    with observed(run, live):
        for index in (0, 1) if run.train.turns == "disjoint" else (0,):
            run.step(index)
