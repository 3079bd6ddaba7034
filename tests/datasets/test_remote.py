"""Shards that are elsewhere: the right bytes or one line that names the shard, never fewer samples."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest
from numbered import numbered
from server import Server, serving

from dmd2 import files
from dmd2.config import Data
from dmd2.datasets import remote, stores, write_images
from dmd2.datasets.loader import Loader
from dmd2.datasets.origin import is_of_other_data
from dmd2.datasets.published import adopt
from dmd2.datasets.reader import ShardReader
from dmd2.datasets.shards import content_id, read_manifest
from dmd2.downloads import fetch
from dmd2.errors import UserError
from dmd2.lineage.spec import Spec

Write = Callable[..., Path]
NUM, SHARD = 23, "shard-00001.tar"
EXPECTED = numbered(range(NUM))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no waiting between attempts."""
    monkeypatch.setenv("DMD2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(stores, "BACKOFF_S", 0.0)
    remote._identity.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def http(cache: Path) -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def published(write: Write, http: Server) -> Server:
    """A server with a set of 23 samples in three shards."""
    folder = write(NUM, 10).parent
    http.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return http


@pytest.fixture
def adopted(published: Server, spec: Spec, tmp_path: Path) -> Path:
    adopt(tmp_path / "here/manifest.json", f"{published.url}/manifest.json", spec)
    published.requests.clear()
    return tmp_path / "here/manifest.json"


def all_of(reader: ShardReader) -> bool:
    found = reader.read(range(NUM))
    np.testing.assert_array_equal(found["latent"], EXPECTED["latent.npy"])
    return found["cls"].tolist() == EXPECTED["cls"]


def cut(server: Server) -> None:
    server.break_after = [1000, 0, 3000, 10, 700]


def unavailable(server: Server) -> None:
    server.statuses = [503, 500, 429, 200, 502]


def short(server: Server) -> None:
    server.cut_to = [2000]


def stalled(server: Server) -> None:
    server.pauses_s = [0.5, 0.5]


@pytest.mark.parametrize("fault", [cut, unavailable, stalled])
def test_faults_that_pass_give_the_right_bytes(
    fault: Callable[[Server], None], published: Server, adopted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "TIMEOUT_S", (5, 0.2))
    fault(published)
    assert all_of(ShardReader(adopted))
    assert len(published.requests) > 6  # three shards and their indexes, and the attempts that failed
    before = len(published.requests)
    assert all_of(ShardReader(adopted))
    assert len(published.requests) == before, "what is in the cache is not fetched again"


def refuse(server: Server) -> None:
    server.statuses = [503] * 50


def hang_up(server: Server) -> None:
    server.break_after = [0] * 50


def lose(server: Server) -> None:
    del server.files[SHARD]


def alter(server: Server) -> None:
    server.files[SHARD] = server.files[SHARD][:-900] + b"x" + server.files[SHARD][-899:]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (refuse, "broken off 6 times .status 503"),
        (hang_up, "broken off 6 times"),
        (lose, "404"),
        (alter, "was altered: its SHA-256 is"),
        (short, "instead of"),
    ],
)
def test_faults_that_stay_are_one_line_with_the_shard(
    fault: Callable[[Server], None], reason: str, published: Server, adopted: Path, cache: Path
) -> None:
    fault(published)
    with pytest.raises(UserError, match=reason) as raised:
        ShardReader(adopted).read([12])
    assert f"{published.url}/{SHARD}" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (cache / "files" / read_manifest(adopted)["shards"][1]["sha256"]).exists()


def test_shards_elsewhere_have_the_content_of_those_made_here(
    adopted: Path, published: Server, spec: Spec, tmp_path: Path
) -> None:
    here, there = read_manifest(adopted, spec.digest), read_manifest(tmp_path / "set/manifest.json", spec.digest)
    assert content_id(here) == content_id(there)
    for elsewhere in (f"{published.url}/manifest.json", f"{published.url}/train-{{0..9}}.tar", str(tmp_path)):
        source = Data(source="webdataset", path=elsewhere, resolution=8, num_classes=10)
        assert not is_of_other_data(adopted, source), "another place of the data starts nothing again"
    batches = [
        Loader(path, batch_size=4, seed=3, cache_bytes=0).batch(7) for path in (adopted, tmp_path / "set/manifest.json")
    ]
    for name in batches[0]:
        np.testing.assert_array_equal(batches[0][name], batches[1][name])
    assert len(published.requests) < 8, "step 7 was reached without reading the steps before"


def test_a_shard_damaged_in_the_cache_is_fetched_again(adopted: Path, published: Server, cache: Path) -> None:
    assert all_of(ShardReader(adopted))
    for path in (cache / "files").iterdir():
        if path.stat().st_size > 2000:
            path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert all_of(ShardReader(adopted))


def test_the_cache_keeps_its_limit_and_what_was_used_last(
    adopted: Path, cache: Path, published: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = read_manifest(adopted)["shards"]
    limit = shards[0]["bytes"] + shards[2]["bytes"] + 3000
    monkeypatch.setenv("DMD2_CACHE_GB", str(limit / 1e9))
    reader = ShardReader(adopted)
    for _ in range(2):
        for number, sample in enumerate((1, 12, 21)):
            assert reader.read([sample])["cls"].tolist() == [sample % 7]
            reader.close()
            held = {path.name: path.stat().st_size for path in (cache / "files").iterdir()}
            assert sum(held.values()) <= limit
            assert shards[number]["sha256"] in held
    monkeypatch.setenv("DMD2_CACHE_GB", str((shards[0]["bytes"] - 1) / 1e9))
    with pytest.raises(UserError, match=r"shard-00000.tar: has .* GB, the cache .* at most .*; raise DMD2_CACHE_GB"):
        ShardReader(adopted).read([1])


def _read_all(manifest: Path, start: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    for _ in range(5):
        assert all_of(ShardReader(manifest))


def test_processes_share_a_cache_that_is_too_small_for_all(
    adopted: Path, published: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DMD2_CACHE_GB", str(2.2 * read_manifest(adopted)["shards"][0]["bytes"] / 1e9))
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    processes = [context.Process(target=_read_all, args=(adopted, start)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an S3 server."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


def test_an_s3_store_serves_shards_and_tars(
    s3: str, cache: Path, write: Write, digits: Data, spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"ENDPOINT_URL": s3, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(remote, "PIECE", 400_000)
    client = boto3.client("s3")
    client.create_bucket(Bucket="images")
    made = tmp_path / "images/manifest.json"
    write_images(made, digits, Spec.of("shards", "shards", data=digits))
    for folder in (made.parent, write(NUM, 10).parent):
        for path in folder.iterdir():
            client.upload_file(str(path), "images", f"{folder.name}/{path.name}")
    adopt(tmp_path / "here/manifest.json", "s3://images/set/manifest.json", spec)
    assert all_of(ShardReader(tmp_path / "here/manifest.json"))

    data = digits.model_copy(update={"source": "webdataset", "path": "s3://images/images/shard-*.tar"})
    sums = "".join(f"{files.sha256(path)}  {path.name}\n" for path in made.parent.glob("*.tar"))
    client.put_object(Bucket="images", Key="images/SHA256SUMS", Body=sums.encode())
    again = write_images(tmp_path / "again/manifest.json", data, Spec.of("shards", "shards", data=data))
    both = [ShardReader(path).read(range(1797)) for path in (made, tmp_path / "again/manifest.json")]
    assert again["num_samples"] == 1797
    for name in both[0]:
        np.testing.assert_array_equal(both[0][name], both[1][name])

    client.delete_object(Bucket="images", Key=f"set/{SHARD}")
    with pytest.raises(UserError, match=rf"s3://images/set/{SHARD} is missing beside its manifest"):
        adopt(tmp_path / "new/manifest.json", "s3://images/set/manifest.json", spec)


def test_tars_on_a_web_server_need_a_range_and_are_compared_with_their_checksums(
    http: Server, write: Write, digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "images/manifest.json"
    write_images(made, digits, Spec.of("shards", "shards", data=digits))
    http.files = {path.name: path.read_bytes() for path in made.parent.glob("*.tar")}
    http.files["SHA256SUMS"] = f"{'0' * 64}  shard-00002.tar\n".encode()
    data = digits.model_copy(update={"source": "webdataset", "path": f"{http.url}/shard-{{00000..00002}}.tar"})
    with pytest.raises(UserError, match=r"shard-00002.tar: was altered: its SHA-256 is .*expected 000"):
        write_images(tmp_path / "again/manifest.json", data, Spec.of("shards", "shards", data=data))
    with pytest.raises(UserError, match=r"a web server lists no files; name them by a range"):
        write_images(made, data.model_copy(update={"path": f"{http.url}/*.tar"}), Spec.of("shards", "x", data=data))
    with pytest.raises(UserError, match=r"shard-7.tar: no such file; upload it or correct the path"):
        write_images(
            made, data.model_copy(update={"path": f"{http.url}/shard-7.tar"}), Spec.of("shards", "x", data=data)
        )


def test_a_local_set_is_used_where_it_is(write: Write, spec: Spec, tmp_path: Path) -> None:
    there = write(NUM, 10)
    os.rename(there.parent, tmp_path / "mounted")
    adopt(tmp_path / "here/manifest.json", str(tmp_path / "mounted/manifest.json"), spec)
    assert all_of(ShardReader(tmp_path / "here/manifest.json"))


def test_a_set_of_another_configuration_is_refused(published: Server, spec: Spec, tmp_path: Path) -> None:
    other = spec.model_copy(update={"version": 9})
    with pytest.raises(UserError, match=r"data.path: http.*manifest.json: made with configuration \w+, but this data"):
        adopt(tmp_path / "here/manifest.json", f"{published.url}/manifest.json", other)
    assert not (tmp_path / "here/manifest.json").exists()
    with pytest.raises(UserError, match=r"http.*/none/manifest.json: no such file"):
        adopt(tmp_path / "here/manifest.json", f"{published.url}/none/manifest.json", spec)


@pytest.mark.parametrize(
    ("source", "path", "reason"),
    [
        ("webdataset", "ftp://host/a.tar", "no ftp:// is known, only http, https, s3"),
        ("image_folder", "https://host/images", "source image_folder reads no URL; pack the images as tars"),
        ("webdataset", "https://me:secret@host/a.tar", "holds a user or password"),
    ],
)
def test_a_path_that_cannot_be_read_is_refused_by_the_configuration(
    source: str, path: str, reason: str, digits: Data
) -> None:
    with pytest.raises(ValueError, match=reason):
        Data.model_validate(digits.model_dump() | {"source": source, "path": path})


def test_settings_of_the_cache_that_cannot_be_are_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMD2_CACHE_GB", "lots")
    with pytest.raises(UserError, match="DMD2_CACHE_GB is 'lots'; set it to a positive number of GB"):
        remote.cache()
    monkeypatch.delenv("DMD2_CACHE_GB")
    monkeypatch.setenv("DMD2_CACHE", "/proc/nothing")
    with pytest.raises(UserError, match=r"DMD2_CACHE: the folder /proc/nothing cannot be written"):
        remote.cache()
