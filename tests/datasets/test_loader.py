import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from events import wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

from dmd2.datasets.loader import EpochStream, Loader, epoch_order, to_pairs
from dmd2.errors import UserError

Write = Callable[..., Path]


@settings(max_examples=150, deadline=None)
@given(num=st.integers(1, 60), batch=st.integers(1, 9), world=st.integers(1, 5), seed=st.integers(0, 2**32))
def test_no_sample_is_lost_or_repeated_within_an_epoch(num: int, batch: int, world: int, seed: int) -> None:
    stream, total = EpochStream(num, seed), batch * world
    steps = -(-3 * num // total)  # the first three epochs, batches across their borders included
    parts = [stream.ids(s * total + r * batch, s * total + (r + 1) * batch) for s in range(steps) for r in range(world)]
    ids = np.concatenate(parts)
    for epoch in range(3):
        assert sorted(ids[epoch * num : (epoch + 1) * num]) == list(range(num))


@settings(max_examples=60, deadline=None)
@given(num=st.integers(1, 40), start=st.integers(0, 200), length=st.integers(1, 100))
def test_any_stretch_of_the_stream_equals_the_permutations_laid_end_to_end(num: int, start: int, length: int) -> None:
    straight = np.concatenate([epoch_order(7, epoch, num) for epoch in range((start + length) // num + 1)])
    np.testing.assert_array_equal(EpochStream(num, 7).ids(start, start + length), straight[start : start + length])


def test_the_order_is_the_one_that_earlier_versions_drew() -> None:
    assert epoch_order(seed=10, epoch=3, num_samples=12).tolist() == [4, 2, 8, 11, 5, 9, 6, 1, 0, 3, 10, 7]


def test_permutations_are_uniform() -> None:
    firsts = np.array([epoch_order(0, epoch, 5) for epoch in range(4000)])  # (epochs, positions)
    counts = np.stack([np.bincount(column, minlength=5) for column in firsts.T])
    # 800 expected in each of 25 cells, standard deviation 25
    assert np.abs(counts - 800).max() < 5 * 25.3


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_ranks_partition_the_global_batch(cache_bytes: int, write: Write) -> None:
    manifest = write(23)
    whole = Loader(manifest, batch_size=6, seed=1, cache_bytes=cache_bytes)
    ranks = [Loader(manifest, batch_size=2, seed=1, rank=r, world=3, cache_bytes=cache_bytes) for r in range(3)]
    for step in range(9):
        parts = [loader.batch(step) for loader in ranks]
        for name, values in whole.batch(step).items():
            np.testing.assert_array_equal(values, np.concatenate([part[name] for part in parts]))


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_a_resumed_loader_gives_what_the_uninterrupted_one_gives(cache_bytes: int, write: Write) -> None:
    manifest = write(23)
    straight = Loader(manifest, batch_size=5, seed=3, cache_bytes=cache_bytes)
    expected = [straight.batch(step) for step in range(14)]
    resumed = Loader(manifest, batch_size=5, seed=3, cache_bytes=cache_bytes)
    for step in (11, 12, 13, 2, 3):  # resumed late, then sent back to an earlier checkpoint
        for name, values in resumed.batch(step).items():
            np.testing.assert_array_equal(values, expected[step][name])


def test_cached_and_streamed_batches_are_the_same(write: Write) -> None:
    manifest = write(23)
    cached = Loader(manifest, batch_size=4, seed=5)
    streamed = Loader(manifest, batch_size=4, seed=5, cache_bytes=0)
    for step in range(12):
        a, b = cached.batch(step), streamed.batch(step)
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])
    np.testing.assert_array_equal(cached.batch(3)["latent"][:, 0], cached.ids(3))


def test_seeds_and_epochs_give_other_orders(write: Write) -> None:
    one, two = (Loader(write(23), batch_size=23, seed=seed) for seed in (1, 2))
    orders = [one.ids(0), one.ids(1), two.ids(0)]
    assert len({tuple(order) for order in orders}) == 3


def test_changing_a_batch_does_not_change_the_cache(write: Write) -> None:
    loader = Loader(write(23), batch_size=4, seed=5)
    loader.batch(0)["latent"][:] = 0
    np.testing.assert_array_equal(loader.batch(0)["latent"][:, 0], loader.ids(0))


def test_the_next_steps_are_read_once_and_in_the_background(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Loader(write(23), batch_size=4, seed=5, cache_bytes=0, prefetch=2)
    read, requested, threads = loader.reader.read, [], set()

    def recorded(ids: np.ndarray, names: None) -> dict[str, np.ndarray]:
        threads.add(threading.current_thread())
        requested.append(ids.tolist())
        return read(ids, names)

    monkeypatch.setattr(loader.reader, "read", recorded)
    loader.batch(0)
    loader.batch(1)
    wait_until(lambda: len(requested) >= 4)
    loader.close()
    assert requested == [loader.ids(step).tolist() for step in range(4)]
    assert len(threads) == 1
    assert threading.main_thread() not in threads


def test_damage_found_in_the_background_reaches_the_caller(write: Write) -> None:
    manifest = write(23)
    (manifest.parent / "shard-00001.tar").unlink()
    loader = Loader(manifest, batch_size=8, seed=5, cache_bytes=0)
    with pytest.raises(UserError, match=r"shard-00001.tar is missing"):
        [loader.batch(step) for step in range(3)]
    loader.close()


def test_fewer_samples_than_a_global_batch_are_refused_with_the_numbers(write: Write) -> None:
    with pytest.raises(UserError, match=r"23 samples .* global batch of 24 \(8 on each of 3 ranks\); lower batch_size"):
        Loader(write(23), batch_size=8, seed=0, world=3)
    assert len(Loader(write(23), batch_size=23, seed=0).batch(0)["cls"]) == 23


def test_a_set_of_another_configuration_is_refused(write: Write) -> None:
    with pytest.raises(UserError, match="expects 0123456789abcdef"):
        Loader(write(23), batch_size=4, seed=0, digest="0123456789abcdef")


def test_pairs_come_as_float32_whatever_they_are_stored_in() -> None:
    raw = {
        "noise": np.array([[1.5]], np.float16),
        "x0": np.array([[0.5]], np.float16),
        "cond.label": np.array([3], np.int64),
    }
    pairs = to_pairs(raw)
    assert pairs.noise.dtype == pairs.x0.dtype == torch.float32
    assert (pairs.noise.item(), pairs.x0.item()) == (1.5, 0.5)
    assert pairs.cond.keys() == {"label"}
    assert pairs.cond["label"].tolist() == [3]
