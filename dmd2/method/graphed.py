"""A distillation whose iterations are CUDA graphs: `runtime.cuda_graphs`. Unverified: no GPU has run it.

The host needs milliseconds for what a GPU launches in a step; a graph is launched as one. Random numbers, batches and
conditions are made outside and copied into buffers (`training.static_inputs`); losses, backward passes, clipping,
optimizers, the finite guard and the average are inside.

An iteration's kernels depend on its turn, the step that backward simulation ends at, the learning rates and the
average's decay. For each such *key* one iteration runs as usual and is recorded, the next is captured, and later ones
are replays. While a learning rate changes (the warm-up) iterations are plain, and while the decay rises the average is
updated after the graph. The result is that of the plain step bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol
from unittest.mock import patch

import torch
from torch import Tensor

from dmd2.errors import UserError
from dmd2.method.distillation import Distillation
from dmd2.training import ranks
from dmd2.training.loop import Trainee, log
from dmd2.training.rng import shared_choice
from dmd2.training.static_inputs import Draws, StaticCalls, StaticReader, copied

Metrics = dict[str, Tensor]
READERS = ("_data", "_pairs", "_prompts")


class Graph(Protocol):
    """A recording of what a function does on the device."""

    def capture(self, function: Callable[[], Metrics]) -> Metrics:
        """Records the function without doing it; returns its results, which are valid after a replay."""

    def replay(self) -> None:
        """Does what was recorded, on the same memory."""


class CudaGraph:
    """`torch.cuda.CUDAGraph`; all graphs of a run share one memory pool, as no two are under way at a time."""

    _pool: Any = None

    def __init__(self) -> None:
        if CudaGraph._pool is None:
            CudaGraph._pool = torch.cuda.graph_pool_handle()
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, function: Callable[[], Metrics]) -> Metrics:
        """See `Graph`."""
        with torch.cuda.graph(self._graph, pool=CudaGraph._pool):
            return function()

    def replay(self) -> None:
        """See `Graph`."""
        self._graph.replay()


class Key(NamedTuple):
    """What an iteration's kernels depend on."""

    moves_generator: bool
    level: int  # the step that backward simulation ends at
    generator_rate: float
    critic_rate: float
    averages: bool  # whether the average is updated inside


class _Generators:
    """`MicroBatches` with the generators of a step made before it."""

    def __init__(self, run: Distillation, index: int):
        self._micro_batches = run.micro_batches
        make = run.micro_batches.rng
        self.made = [make(run.train.seed, index, i, run.device) for i in range(run.micro_batches.num)]

    def rng(self, seed: int, step: int, micro_batch: int, device: torch.device) -> torch.Generator:
        return self.made[micro_batch]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._micro_batches, name)


class _Conditioner:
    """A conditioner whose `embed` is called outside of the graph."""

    def __init__(self, conditioner: Any, embed: StaticCalls):
        self._conditioner, self.embed = conditioner, embed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._conditioner, name)


class Captured:
    """The iterations of one key: recorded, then captured, then replayed."""

    def __init__(self, run: Distillation, key: Key, graph: Graph):
        self._run, self._key, self._graph = run, key, graph
        self.draws = Draws()
        self.embed = StaticCalls(run.teacher.conditioner.embed)
        self.readers = {name: StaticReader(read) for name in READERS if (read := getattr(run, name)) is not None}
        self.metrics: Metrics | None = None

    @contextmanager
    def _static(self, generators: _Generators) -> Iterator[None]:
        """Within the block the run's step takes everything from buffers, and leaves to us what the host does."""
        run = self._run
        teacher = dataclasses.replace(run.teacher, conditioner=_Conditioner(run.teacher.conditioner, self.embed))
        places = {"teacher": teacher, "micro_batches": generators, "_lag": lambda *_: {}, **self.readers}
        with ExitStack() as stack:
            for name, value in places.items():
                stack.enter_context(patch.object(run, name, value))
            if not self._key.averages:
                stack.enter_context(patch.object(run.ema, "update", lambda: None))
            stack.enter_context(self.draws)
            yield

    def record(self, index: int) -> Metrics:
        """Iteration `index` as usual, on buffers that later iterations use."""
        generators = _Generators(self._run, index)
        self.draws.numbered(generators.made)
        with self._static(generators):
            metrics = self._run.step(index)
        self.draws.close()
        return metrics

    def __call__(self, index: int) -> Metrics:
        """Iteration `index` as a replay, captured the first time. The metrics are copies."""
        generators = _Generators(self._run, index)
        self.draws.numbered(generators.made)
        self.draws.refill()
        for reader in self.readers.values():
            reader.refill(index)
        self.embed.refill()
        if self.metrics is None:

            def step() -> Metrics:
                with self._static(generators):
                    return self._run.step(index)

            self.metrics = self._graph.capture(step)
        elif self._key.averages and self._key.moves_generator:
            self._run.ema.count()  # the host's part of an update, which a replay has not
        self._graph.replay()
        copies: Metrics = copied(self.metrics)
        return copies


class Graphed:
    """A `Trainee` for `training.loop.fit`: the run, whose iterations are graphs once they repeat.

    Raises UserError with several processes, whose exchange is not captured yet.
    """

    def __init__(self, run: Distillation, make_graph: Callable[[], Graph] = CudaGraph):
        if ranks.world_size() > 1:
            raise UserError("runtime.cuda_graphs works with one process; set it to false to train on several GPUs")
        self.run, self._make_graph = run, make_graph
        self.captured: dict[Key, Captured] = {}
        self.guard = run.guard
        self.guard.clock = torch.zeros((), dtype=torch.int64, device=run.device)
        self.export, self.state_dict, self.load_state_dict = run.export, run.state_dict, run.load_state_dict

    def step(self, index: int) -> Metrics:
        """See `Distillation.step`."""
        run, train = self.run, self.run.train
        assert self.guard.clock is not None
        self.guard.clock.fill_(index)
        moves = index % train.critic_steps_per_generator == 0
        rates = run.rates(index)
        if rates != run.rates(index + 1) or not (moves or train.has_critic):
            return run.step(index)
        simulates = train.num_steps > 1 and train.backward_simulation
        level = shared_choice(train.seed, index, train.num_steps) if simulates else 0
        key = Key(moves, level, *rates, averages=moves and run.ema.is_settled)
        if key in self.captured:
            metrics = self.captured[key](index)
        else:
            self.captured[key] = Captured(run, key, self._make_graph())
            metrics = self.captured[key].record(index)
        if moves and not key.averages:
            run.ema.update()
        if "denoising_loss" in metrics:
            metrics |= run._lag(index, metrics["denoising_loss"])
        return metrics


def graphed(run: Distillation, wanted: bool) -> Trainee:
    """The run, or if `wanted` and on a GPU its iterations as graphs. Raises UserError for a run with averages."""
    if not wanted:
        return run
    if run.device.type != "cuda":
        log.warning("runtime.cuda_graphs is ignored on the %s; it needs a GPU", run.device.type)
        return run
    if run.train.ema_lengths is not None:
        raise UserError("runtime.cuda_graphs cannot hold averages whose decay changes; unset it or the ema_lengths")
    return Graphed(run)
