"""A rank's share of a global batch in equal parts, which pass the networks one after the other.

W ranks of A parts each are W * A slots, numbered slot = rank * A + part. A part draws the random numbers of its slot
and takes the samples of its slot, the slot-th run of consecutive samples of the global batch. W ranks of one part and
one rank of W parts are therefore the same run, up to the order of sums.

Shapes: B samples of one part, `...` the shape of one sample.
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
    """`num` parts of `size` samples: this rank's share of a global batch."""

    num: int
    size: int

    @classmethod
    def of(cls, batch_size: int, micro_batch_size: int | None) -> MicroBatches:
        """The fewest equal parts of at most `micro_batch_size` samples; one part where there is no such limit.

        Raises UserError if the ranks do not divide the batch.
        """
        share = ranks.local_share(batch_size)
        size = largest_part(share, micro_batch_size)
        return cls(share // size, size)

    def is_last(self, part: int) -> bool:
        """Whether no part comes after this one."""
        return part == self.num - 1

    def rng(self, seed: int, step: int, part: int, device: torch.device) -> torch.Generator:
        """The random numbers of a part's slot at a step."""
        return step_rng(seed, step, ranks.rank() * self.num + part, device=device)


class BatchReader:
    """A rank's batches, read once a step and handed out in parts on the device.

    `batches` gives this rank's share of global batch `step`: tensors with the samples first, and conditions.
    """

    def __init__(self, batches: Callable[[int], tuple[Any, ...]], parts: MicroBatches, device: torch.device):
        self._batches, self._micro_batches, self._device = batches, parts, device
        self._step = -1
        self._batch: tuple[Any, ...] = ()

    def __call__(self, step: int, part: int) -> tuple[Any, ...]:
        """Samples `part * size` to `(part + 1) * size` of the share: what `batches` gives, B samples of it."""
        if step != self._step:
            self._step, self._batch = step, self._batches(step)
            if (found := len(self._batch[0])) != self._micro_batches.num * self._micro_batches.size:
                raise ValueError(f"batch {step} has {found} samples; this rank's share is {self._micro_batches}")
        start = part * self._micro_batches.size
        return tuple(self._taken(item, slice(start, start + self._micro_batches.size)) for item in self._batch)

    def _taken(self, item: Tensor | Mapping[str, Tensor], span: slice) -> Any:
        if isinstance(item, Tensor):
            # From pinned memory the copy to a GPU runs beside the computation; the CPU has nothing to copy.
            return item[span].to(self._device, non_blocking=self._device.type == "cuda")
        return {name: self._taken(value, span) for name, value in item.items()}


def means(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each scalar over the parts, on the device; all rows have the same names."""
    return {name: sum((row[name] for row in rows[1:]), rows[0][name]) / len(rows) for name in rows[0]}
