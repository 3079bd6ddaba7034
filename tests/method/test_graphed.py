"""The captured step without a GPU: a stand-in for CUDA graphs repeats the recorded operations on the same memory.

As a graph, the stand-in bakes in every number and branch of the host, so a replay equals the plain step only if all
that differs between iterations comes through buffers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_distillation import distillation
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dmd2.errors import UserError
from dmd2.method.distillation import Distillation
from dmd2.method.graphed import Graphed


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def storages(value: Any) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors(value)}


class Operations(TorchDispatchMode):
    """Runs each operation and keeps it, with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, out))
        return out


class RecordedGraph:
    """See `Graph`; unlike CUDA's it also does the operations at the capture, and not at the replay that follows."""

    made: list[RecordedGraph]

    def __init__(self) -> None:
        self.operations, self.fresh = Operations(), True
        self.replays = 0
        RecordedGraph.made.append(self)

    def capture(self, function: Callable[[], Any]) -> Any:
        with self.operations:
            return function()

    def replay(self) -> None:
        self.replays += not self.fresh
        if self.fresh:
            self.fresh = False
            return
        with torch.no_grad():
            for func, args, kwargs, out in self.operations.done:
                if func._schema.is_mutable:
                    func(*args, **kwargs)
                elif not (storages(out) & storages((args, kwargs)) or "empty" in func._schema.name):
                    for old, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                        old.copy_(new)

    def outside(self) -> set[int]:
        """The memory that the graph reads or writes and has not made itself."""
        own: set[int] = set()
        found: set[int] = set()
        for _, args, kwargs, out in self.operations.done:
            found |= storages((args, kwargs)) - own
            own |= storages(out) - found
        return found - {0}


RUNS: dict[str, dict[str, Any]] = {
    "gan, average, warm-up": {"critic_steps_per_generator": 2, "ema_decay": 0.3, "warmup_iterations": 3},
    "backward simulation": {"critic_steps_per_generator": 2, "num_steps": 2},
    "regression, disjoint turns": {
        "critic_steps_per_generator": 3,
        "turns": "disjoint",
        "regression_weight": 0.5,
        "gan_taps": 1,
    },
    "real inputs": {"critic_steps_per_generator": 2, "num_steps": 2, "backward_simulation": False},
}


def static_memory(run: Distillation, graphed: Graphed) -> set[int]:
    """All memory that stays: weights, moments, average, guard, tables and the buffers of inputs."""
    known = storages([run.state_dict(), *run.teacher.denoiser.state_dict().values(), run._sigma_table])
    known |= storages([[moments.step for moments in o._moments] for o in optimizers(run)])
    for network in (run.generator, run.critic, run.teacher.denoiser):
        known |= storages([*network.parameters(), *network.buffers()])
    guard = run.guard
    known |= storages([guard._step, guard.tripped, guard.clock, guard._bad, run.teacher.grid.sigmas])
    for captured in graphed.captured.values():
        known |= storages([draw.buffer for draw in captured.draws.recorded])
        known |= storages([reader.buffers for reader in captured.readers.values()])
        known |= storages([out for _, out in captured.embed.calls])
    return known


def optimizers(run: Distillation) -> list[Any]:
    return [run._generator_optimizer, run._critic_optimizer]


@pytest.mark.parametrize("name", list(RUNS))
def test_replays_are_the_plain_step_bit_for_bit_on_memory_that_stays(name: str):
    RecordedGraph.made = []
    plain, run = distillation(**RUNS[name]), distillation(**RUNS[name])
    graphed = Graphed(run, RecordedGraph)
    for index in range(16):
        expected, found = plain.step(index), graphed.step(index)
        assert list(found) == list(expected), index
        for key, value in expected.items():
            assert torch.equal(found[key], value), (index, key)
    states = [tree_leaves(r.state_dict()) for r in (plain, run)]
    for one, other in zip(*states, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    assert sum(graph.replays for graph in RecordedGraph.made) >= 5
    known = static_memory(run, graphed)
    for graph in RecordedGraph.made:
        assert graph.outside() <= known, "a graph reads memory that is freed, or that nobody fills"


def test_the_guard_names_the_step_of_a_replay():
    RecordedGraph.made = []
    run = distillation(critic_steps_per_generator=1, gan_generator_weight=0, gan_critic_weight=0)
    graphed = Graphed(run, RecordedGraph)
    for index in range(4):
        if index == 3:
            with torch.no_grad():
                next(run.critic.fake.parameters()).fill_(float("nan"))
        weights = copy.deepcopy(run.critic.state_dict())
        graphed.step(index)
    with pytest.raises(UserError, match=r"^step 4: denoising_loss, critic_grad_norm not finite"):
        graphed.guard.raise_if_tripped()
    for key, value in run.critic.state_dict().items():
        assert torch.equal(value.nan_to_num(), weights[key].nan_to_num()), "the update was not made"


def test_a_step_that_reads_on_the_host_is_refused(monkeypatch: pytest.MonkeyPatch):
    run = distillation(critic_steps_per_generator=2)
    step = run.step
    monkeypatch.setattr(run, "step", lambda index: {k: v * float(v) for k, v in step(index).items()})
    with pytest.raises(UserError, match=r"^runtime.cuda_graphs: this run's step reads a value on the host"):
        Graphed(run, RecordedGraph).step(0)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch):
    run = distillation()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^runtime.cuda_graphs works with one process"):
        Graphed(run, RecordedGraph)
