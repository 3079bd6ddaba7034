"""All measures of a set of samples, per block, and the score of the data itself (the floor).

Shapes: N samples in S blocks. A result is the content of the `metrics` record of a run:
`{"metrics": {name: {"mean", "sd", "blocks"}}, "num_samples": per block, "num_blocks": S}`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np

from dmd2.config import Evaluation
from dmd2.metrics.context import Context
from dmd2.metrics.distances import Device
from dmd2.metrics.images import Images, Labels, batch_of, batches
from dmd2.metrics.measure import Draw, Kept
from dmd2.metrics.reference import Reference
from dmd2.metrics.registry import measures_of
from dmd2.metrics.tally import Meter, Tally

Make = Callable[[range], tuple[Sequence[Images], Labels]]
"""The images of the samples with the given ids under each protocol, and their labels."""


def tally_range(meter: Meter, make: Make, ids: range) -> Tally:
    """The tally of the samples `ids`, all of one block, generated in batches."""
    size = batch_of(meter.reference.image_shape)
    parts = [range(ids.start + part.start, ids.start + part.stop) for part in batches(len(ids), size)]
    return reduce(Tally.merge, (meter.tally(*make(part), part.start % meter.num_samples) for part in parts))


def measure_blocks(meter: Meter, make: Make, num_blocks: int = 1) -> dict[str, Any]:
    """Metrics of consecutive blocks of `meter.num_samples`, with mean and standard deviation.

    Samples are generated, measured and discarded in batches.
    """
    size = meter.num_samples
    starts = range(0, size * num_blocks, size)
    blocks = [meter.measures(tally_range(meter, make, range(start, start + size))) for start in starts]
    return summary(blocks, size)


def resample_floor(
    reference: Reference,
    num_samples: int,
    draws: int = 3,
    seed: int = 0,
    device: Device = "cpu",
    evaluation: Evaluation | None = None,
) -> dict[str, Any]:
    """The values of `num_samples` images drawn with replacement from the data against the data, over `draws` draws.

    This is the floor: a perfect model's score, due to sampling noise alone. Two measures are replaced, as they are
    meaningless for images from the data: the nearest distance is the mean leave-one-out distance of the data, and
    precision and recall compare two random halves of the data. With more than `MAX_KEPT` real images only the kept ones
    are used.
    """
    rng, halves = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    num_kept, kept = len(reference.images), Kept(reference, device)
    measures = measures_of(Context(reference, num_samples, ("edm",), device, evaluation or Evaluation()))
    blocks = []
    for _ in range(draws):
        draw = Draw(kept, rng.integers(num_kept, size=num_samples), halves.permutation(num_kept))
        values: dict[str, float] = {}
        for measure in measures.values():
            values |= measure.floor(draw)
        blocks.append(values)
    return summary(blocks, num_samples)


def summary(blocks: Sequence[dict[str, float]], num_samples: int) -> dict[str, Any]:
    """A record's content: mean, standard deviation (divisor S - 1; None for one block) and values of the blocks."""
    columns = {name: [block[name] for block in blocks] for name in blocks[0]}
    metrics = {
        name: {
            "mean": float(np.mean(values)),
            "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            "blocks": values,
        }
        for name, values in columns.items()
    }
    return {"metrics": metrics, "num_samples": num_samples, "num_blocks": len(blocks)}
