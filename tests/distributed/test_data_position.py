"""The stream of samples does not know how many ranks share it: it goes on where it was when their number changes."""

from pathlib import Path

import numpy as np
import pytest

from dmd2.config import Data
from dmd2.datasets import write_shards
from dmd2.datasets.loader import Loader
from dmd2.lineage.spec import Spec

NUM_SAMPLES, BATCH = 53, 8  # epochs and batches do not line up


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A latent set in which a sample's latent is its id."""
    manifest = tmp_path_factory.mktemp("latents") / "manifest.json"
    spec = Spec.of("latents", "latents", data=Data(source="digits", resolution=1, channels=1, num_classes=2))

    def make(ids: range) -> dict[str, np.ndarray]:
        return {"latent.npy": np.array(ids, np.float32).reshape(-1, 1), "cond.label.npy": np.array(ids, np.int64) % 2}

    write_shards(manifest, NUM_SAMPLES, 20, make, spec)
    return manifest


def requested_ids(manifest: Path, world: int, steps: range, *, cached: bool) -> list[int]:
    """The samples that `world` ranks get together in these iterations, in the order of the ranks."""
    cache = {} if cached else {"cache_bytes": 0}
    loaders = [Loader(manifest, batch_size=BATCH // world, seed=4, rank=r, world=world, **cache) for r in range(world)]
    found = [int(x) for step in steps for loader in loaders for x in loader.batch(step)["latent"][:, 0]]
    for loader in loaders:
        loader.close()
    return found


@pytest.mark.parametrize("cached", [True, False])
def test_every_epoch_has_each_sample_once_though_the_ranks_change_from_two_to_one_to_four(manifest: Path, cached: bool):
    spans = [(2, range(9)), (1, range(9, 12)), (4, range(12, 40))]  # a run saved and taken up again, twice
    stream = [x for world, steps in spans for x in requested_ids(manifest, world, steps, cached=cached)]
    assert len(stream) == 40 * BATCH
    epochs = [stream[start : start + NUM_SAMPLES] for start in range(0, len(stream), NUM_SAMPLES)]
    for epoch in epochs[:-1]:
        assert sorted(epoch) == list(range(NUM_SAMPLES)), "none is lost, none comes twice"
    assert len(set(epochs[-1])) == len(epochs[-1])
    assert epochs[0] != epochs[1], "each epoch has an order of its own"
    assert stream == requested_ids(manifest, 1, range(40), cached=cached), "as one process requests them from the start"
