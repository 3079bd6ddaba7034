"""How a run fits on its devices: what each of them holds, and how many samples it can pass at a time.

Memory beyond what the step itself makes is ASSUMED: `RESERVED_GIB` for the driver, libraries and communication, and
`FRAGMENTATION` of the rest that the allocator cannot use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Literal

from dmd2.config import largest_part
from dmd2.cost.gpus import Gpu
from dmd2.cost.memory import GIB, Memory, State
from dmd2.cost.step_parts import CRITIC_TURN, GENERATOR_TURN, OPTIMIZERS
from dmd2.errors import UserError

RESERVED_GIB = 2.0
FRAGMENTATION = 0.05
GATHERED_UNITS = 2
"""Units of a sharded network that are whole on a device at a time: the one in use and the next."""

Layout = Literal["replicate", "shard"]
Measured = Callable[[int, int], Memory]
"""(parts, samples) -> the memory of a device that passes `samples` at a time, in one part or in several (2)."""


def capacity(gpu: Gpu) -> float:
    """The bytes of a GPU that a step can have."""
    return (gpu.memory_gib - RESERVED_GIB) * (1 - FRAGMENTATION) * GIB


def sharded(memory: Memory, gpus: int) -> Memory:
    """The memory of one of `gpus` ranks that hold networks, optimizers and gradients in parts (an estimate).

    A turn's gradients are divided; `GATHERED_UNITS` of the largest unit and the gradient of one lie whole.
    """
    kept = 1 - 1 / gpus
    whole = memory.state
    gathered = (GATHERED_UNITS + 1) * whole.largest_unit
    less = dict.fromkeys(GENERATOR_TURN, kept * whole.generator_gradients)
    less |= dict.fromkeys((*CRITIC_TURN, OPTIMIZERS), kept * whole.critic_gradients)
    turns = {
        part: turn.plus(-less[part]).plus(gathered) if part in less else turn for part, turn in memory.turns.items()
    }
    state = State(**{name: -(-size // gpus) for name, size in asdict(whole).items()})
    return Memory(replace(state, largest_unit=whole.largest_unit), turns)


@dataclass(frozen=True)
class Placement:
    """A run on its devices."""

    share: int  # of the global batch, for one device
    micro_batch: int  # samples passed at a time; a divisor of the share
    largest: int  # the largest such divisor that fits; 0 if not even one sample does
    memory: Memory
    whole: State  # of the run, before it is dealt to ranks

    @property
    def parts(self) -> int:
        """Passes whose gradients are summed to one update."""
        return self.share // self.micro_batch

    @property
    def fits(self) -> bool:
        """Whether the micro batch is one that fits."""
        return self.micro_batch <= self.largest


def check_share(run: str, batch: int, gpus: int) -> None:
    """Raises UserError if the devices do not divide a run's batch."""
    share, rest = divmod(batch, gpus)
    if rest:
        below = f"{batch - rest} or " if share else ""
        raise UserError(
            f"run {run}: batch_size {batch} is not divisible by {gpus} GPUs; use {below}{batch + gpus - rest}"
        )


def place(measured: Measured, room: float, layout: Layout, gpus: int, batch: int, micro: int | None) -> Placement:
    """The run with a global `batch` on `gpus` devices of `room` bytes, at most `micro` samples at a time.

    Where it does not fit `Placement.fits` says so. The devices must divide the batch: see `check_share`.
    """
    share = batch // gpus

    def held(samples: int) -> Memory:
        memory = measured(min(share // samples, 2), samples)
        return sharded(memory, gpus) if layout == "shard" and gpus > 1 else memory

    sizes = [n for n in range(share, 0, -1) if share % n == 0]
    largest = next((n for n in sizes if held(n).peak(n) <= room), 0)
    chosen = largest_part(share, micro)
    return Placement(share, chosen, largest, held(chosen), measured(1, share).state)
