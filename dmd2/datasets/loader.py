"""Stateless batches for training: a function of (seed, step), so that a resumed run needs only the step.

The stream of sample ids is infinite: a permutation of the set for each epoch, seeded by (seed, epoch). Global batch
`step` is a range of consecutive positions in it, of which rank r reads the r-th share; a batch may span two epochs, so
that an epoch has every sample exactly once for any batch size. Global batches do not depend on the number of ranks.

Shapes: B batch of one rank, `...` the shape of one sample in the network's space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dmd2.datasets.reader import ShardReader
from dmd2.errors import UserError
from dmd2.method.denoiser import Codec, Cond

Raw = Mapping[str, np.ndarray]
"""Decoded arrays of a batch by name."""


def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """The permutation (N,) of an epoch, from raw PCG64 words, whose stream NumPy guarantees across versions."""
    words = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_samples)
    return np.argsort(words, kind="stable")


class EpochStream:
    """The infinite stream of sample ids."""

    def __init__(self, num_samples: int, seed: int):
        self.num_samples = num_samples
        self._order = lru_cache(maxsize=2)(partial(epoch_order, seed, num_samples=num_samples))

    def ids(self, start: int, stop: int) -> np.ndarray:
        """The ids at positions [start, stop)."""
        epochs = range(start // self.num_samples, (stop - 1) // self.num_samples + 1)
        parts = []
        for epoch in epochs:
            first = epoch * self.num_samples
            parts.append(self._order(epoch)[max(start - first, 0) : stop - first])
        return np.concatenate(parts)


class Loader:
    """The batches of one rank.

    `batch_size` is per rank; the global batch is batch_size * world. A set of at most `cache_bytes` decoded is cached
    in memory as one array per name; of a larger one a background thread prefetches `prefetch` steps. Without `names` a
    batch has everything but the captions, of which the set has the tokens.

    Raises UserError if the set has fewer samples than one global batch, or was written under another `digest`.
    """

    def __init__(
        self,
        manifest: Path | str,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        names: Sequence[str] | None = None,
        digest: str | None = None,
        cache_bytes: int = 256 * 2**20,
        prefetch: int = 2,
    ):
        self.reader = ShardReader(manifest, digest)
        self._global_batch = batch_size * world
        if len(self.reader) < self._global_batch:
            raise UserError(
                f"{manifest}: {len(self.reader)} samples are fewer than one global batch of {self._global_batch} "
                f"({batch_size} on each of {world} ranks); lower batch_size or supply more data"
            )
        self._batch_size, self._rank = batch_size, rank
        self._names = [name for name in self.reader.fields if name != "txt"] if names is None else names
        self._stream = EpochStream(len(self.reader), seed)
        self._cache: dict[str, np.ndarray] | None = None
        if self.reader.num_bytes(self._names) <= cache_bytes:
            self._cache = self.reader.read(range(len(self.reader)), self._names)
            self.reader.close()
        self._prefetch = prefetch
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="loader")  # starts its thread when first used
        self._pending: dict[int, Future[dict[str, np.ndarray]]] = {}

    def ids(self, step: int) -> np.ndarray:
        """The sample ids of this rank's batch at `step`: (B,)."""
        start = step * self._global_batch + self._rank * self._batch_size
        return self._stream.ids(start, start + self._batch_size)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This rank's batch at `step`: arrays (B, ...) by name."""
        if self._cache is not None:
            ids = self.ids(step)
            return {name: values.take(ids, axis=0) for name, values in self._cache.items()}
        ahead = range(step, step + 1 + self._prefetch)
        for old in self._pending.keys() - set(ahead):
            self._pending.pop(old).cancel()
        for number in ahead:
            if number not in self._pending:
                self._pending[number] = self._worker.submit(self._read, number)
        return self._pending.pop(step).result()

    def close(self) -> None:
        """Stops prefetching and closes the shards."""
        self._worker.shutdown(cancel_futures=True)
        self.reader.close()

    def _read(self, step: int) -> dict[str, np.ndarray]:
        return self.reader.read(self.ids(step), self._names)


class DataBatch(NamedTuple):
    """Real samples: x0 float32 (B, ...) and their conditions."""

    x0: Tensor
    cond: Cond


class PairBatch(NamedTuple):
    """Noise (B, ...), the image x0 (B, ...) to which the teacher's ODE maps it, and the conditions."""

    noise: Tensor
    x0: Tensor
    cond: Cond


def to_batch(raw: Raw, codec: Codec) -> DataBatch:
    """A batch of a latent set as tensors: x0 from `latent` by the codec, and every `cond.NAME` unchanged."""
    return DataBatch(codec.load(raw["latent"]), _cond(raw))


def to_pairs(raw: Raw) -> PairBatch:
    """A batch of a pair set as tensors; noise and x0 are converted to float32."""
    noise, x0 = (torch.from_numpy(raw[name]).float() for name in ("noise", "x0"))
    return PairBatch(noise, x0, _cond(raw))


def _cond(raw: Raw) -> dict[str, Tensor]:
    return {name.removeprefix("cond."): torch.from_numpy(raw[name]) for name in raw if name.startswith("cond.")}
