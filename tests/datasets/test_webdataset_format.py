"""Shards are WebDataset's format, to the byte."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numbered import numbered

from dmd2.datasets.shards import read_manifest

Write = Callable[..., Path]


def test_webdataset_itself_reads_the_shards(write: Write) -> None:
    import webdataset

    manifest = write()
    urls = [str(manifest.parent / shard["name"]) for shard in read_manifest(manifest)["shards"]]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"{i:09d}" for i in range(23)]
    assert [sample["cls"] for sample in samples] == [i % 7 for i in range(23)]
    np.testing.assert_array_equal([s["latent.npy"] for s in samples], numbered(range(23))["latent.npy"])


def test_the_bytes_are_those_of_webdatasets_own_writer(write: Write, tmp_path: Path) -> None:
    from webdataset.writer import TarWriter

    manifest = write()
    with (
        (tmp_path / "truth.tar").open("wb") as stream,
        TarWriter(stream, encoder=False, mtime=0, user="", group="") as tar,
    ):
        for number in range(20, 23):
            latent = io.BytesIO()
            np.save(latent, np.array([number, number + 0.25, number + 0.5], np.float16))
            tar.write({"__key__": f"{number:09d}", "latent.npy": latent.getvalue(), "cls": b"%d" % (number % 7)})
    assert (manifest.parent / "shard-00002.tar").read_bytes() == (tmp_path / "truth.tar").read_bytes()
