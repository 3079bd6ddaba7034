"""Gradient accumulation: a rank's share of a global batch as equal micro-batches, run one after the other.

W ranks with A micro-batches each use global micro-batch indices slot = rank * A + micro_batch. The slot seeds the
random numbers and selects the slot-th run of consecutive samples of the global batch. W ranks with one micro-batch
and one rank with W micro-batches therefore compute the same run, up to the order of sums.

Shapes: B samples of one micro-batch, `...` the shape of one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmd2.config import largest_part
from dmd2.training import ranks
from dmd2.training.rng import step_rng


@dataclass(frozen=True)
class MicroBatches:
    """This rank's share of a global batch: `num` micro-batches of `size` samples."""

    num: int
    size: int

    @classmethod
    def of(cls, batch_size: int, micro_batch_size: int | None) -> MicroBatches:
        """The fewest equal micro-batches of at most `micro_batch_size` samples; a single one if it is None.

        Raises UserError if `batch_size` is not divisible by the number of ranks.
        """
        share = ranks.local_share(batch_size)
        size = largest_part(share, micro_batch_size)
        return cls(share // size, size)

    def is_last(self, micro_batch: int) -> bool:
        """Whether `micro_batch` is the last of this rank's share."""
        return micro_batch == self.num - 1

    def rng(self, seed: int, step: int, micro_batch: int, device: torch.device) -> torch.Generator:
        """The random generator of a micro-batch at a step, seeded by its global index (slot)."""
        return step_rng(seed, step, ranks.rank() * self.num + micro_batch, device=device)


class BatchReader:
    """Reads a rank's batch once per step and returns its micro-batches on the device.

    `batches(step)` returns this rank's share of global batch `step`: tensors with the batch dimension first, and
    conditions.
    """

    def __init__(self, batches: Callable[[int], tuple[Any, ...]], micro_batches: MicroBatches, device: torch.device):
        self._batches, self._micro_batches, self._device = batches, micro_batches, device
        self._step = -1
        self._batch: tuple[Any, ...] = ()

    def __call__(self, step: int, micro_batch: int) -> tuple[Any, ...]:
        """Samples [micro_batch * size, (micro_batch + 1) * size) of the share, in the form that `batches` returns.

        Raises ValueError if `batches` returns a share of another size.
        """
        if step != self._step:
            self._step, self._batch = step, self._batches(step)
            if (found := len(self._batch[0])) != self._micro_batches.num * self._micro_batches.size:
                raise ValueError(f"batch {step} has {found} samples; this rank's share is {self._micro_batches}")
        start = micro_batch * self._micro_batches.size
        return tuple(self._taken(item, slice(start, start + self._micro_batches.size)) for item in self._batch)

    def _taken(self, item: Tensor | Mapping[str, Tensor], span: slice) -> Any:
        if isinstance(item, Tensor):
            # Asynchronous from pinned memory to a GPU; no copy on the CPU.
            return item[span].to(self._device, non_blocking=self._device.type == "cuda")
        return {name: self._taken(value, span) for name, value in item.items()}


def means(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each scalar () over the micro-batches, on the device; all rows have the same names."""
    return {name: sum((row[name] for row in rows[1:]), rows[0][name]) / len(rows) for name in rows[0]}
