import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path

import numpy as np
import pytest
from numbered import numbered

from dmd2.datasets import reader as reader_module
from dmd2.datasets.reader import ShardReader
from dmd2.errors import UserError

Write = Callable[..., Path]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 700)


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shorten(path: Path) -> None:
    """A valid tar with fewer samples, in the place of the whole one."""
    path.write_bytes(path.with_name("shard-00002.tar").read_bytes())


def lose_index(path: Path) -> None:
    path.with_suffix(".json").unlink()


def alter_index(path: Path) -> None:
    alter(path.with_suffix(".json"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (Path.unlink, "is missing"),
        (truncate, "has 15[0-9]+ bytes|has [0-9]+ bytes instead of"),
        (alter, "was altered"),
        (shorten, "has [0-9]+ bytes instead of"),
        (lose_index, "has lost its index shard-00001.json"),
        (alter_index, "has an altered index shard-00001.json"),
    ],
)
def test_a_damaged_shard_is_named_with_the_remedy_and_the_others_are_read(
    damage: Callable[[Path], None], reason: str, write: Write
) -> None:
    manifest = write()
    ShardReader(manifest).verify()  # damage after a good first look is seen by the next reader
    damage(manifest.parent / "shard-00001.tar")
    reader = ShardReader(manifest)
    assert reader.read([3, 21])["cls"].tolist() == [3, 0]
    with pytest.raises(UserError, match=rf"shard-00001.tar ({reason}).*; delete .*manifest.json and run the rule"):
        reader.read([12])
    with pytest.raises(UserError, match="shard-00001"):
        ShardReader(manifest).verify()


def test_a_refused_shard_is_closed(write: Write) -> None:
    manifest, opened = write(), []

    def open_shard(path: Path) -> BufferedReader:
        opened.append(path.open("rb"))
        return opened[-1]

    alter(manifest.parent / "shard-00001.tar")
    with pytest.raises(UserError, match="was altered"):
        ShardReader(manifest, open_shard=open_shard).read([12])
    assert [file.closed for file in opened] == [True]


def test_a_shard_cut_while_open_is_named(write: Write) -> None:
    manifest = write()
    reader = ShardReader(manifest)
    reader.read([0])
    os.truncate(manifest.parent / "shard-00000.tar", 600)
    with pytest.raises(UserError, match=r"shard-00000.tar became shorter"):
        reader.read(range(10))


def test_a_shard_is_hashed_once_per_process(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, hashed = write(), []
    digest = reader_module.hashlib.file_digest
    monkeypatch.setattr(reader_module.hashlib, "file_digest", lambda f, n: hashed.append(f.name) or digest(f, n))
    for _ in range(3):
        ShardReader(manifest).verify()
    assert len(hashed) == 3


def test_samples_come_in_the_requested_order_with_repeats(write: Write) -> None:
    ids = [22, 0, 10, 9, 10, 21, 0]
    raw = ShardReader(write()).read(ids)
    np.testing.assert_array_equal(raw["latent"], numbered(range(23))["latent.npy"][ids])
    assert raw["cls"].tolist() == [i % 7 for i in ids]
    assert raw["latent"].dtype == np.float16


def test_batches_cover_the_set_in_order(write: Write) -> None:
    batches = list(ShardReader(write()).batches(8))
    assert [len(b["cls"]) for b in batches] == [8, 8, 7]
    np.testing.assert_array_equal(np.concatenate([b["latent"] for b in batches]), numbered(range(23))["latent.npy"])


def test_only_the_requested_names_are_read(write: Write) -> None:
    reader = ShardReader(write())
    assert reader.read([1], ["cls"]).keys() == {"cls"}
    with pytest.raises(UserError, match=r"manifest.json: has no `image`, only cls, latent; is it the right set"):
        reader.read([1], ["image"])


@pytest.mark.parametrize("ids", [[23], [-1], [0, 99]])
def test_ids_outside_the_set_are_refused(ids: list[int], write: Write) -> None:
    with pytest.raises(UserError, match="it has 23"):
        ShardReader(write()).read(ids)


def test_no_ids_give_empty_arrays(write: Write) -> None:
    assert ShardReader(write()).read([])["latent"].shape == (0, 3)


def test_num_bytes_is_the_size_of_the_decoded_arrays(write: Write) -> None:
    reader = ShardReader(write())
    assert reader.num_bytes() == sum(values.nbytes for values in reader.read(range(23)).values())
    assert reader.num_bytes(["latent"]) == 23 * 3 * 2


def test_more_shards_than_open_files_are_read_by_several_threads(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "MAX_OPEN_FILES", 2)
    opened = []

    def open_shard(path: Path) -> BufferedReader:
        file = path.open("rb")
        opened.append(file)
        return file

    reader = ShardReader(write(60, size=10), open_shard=open_shard)
    rng = np.random.default_rng(0)
    wanted = [rng.integers(0, 60, 20) for _ in range(40)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda ids: reader.read(ids, ["latent"])["latent"][:, 0], wanted))
    np.testing.assert_array_equal(found, wanted)
    assert sum(not file.closed for file in opened) == 2
    reader.close()
    assert all(file.closed for file in opened)
