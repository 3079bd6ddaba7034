"""Results in a store: everything that rules write is declared, and jobs read and write nothing but the store."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from checkout import NOTHING, Checkout
from moto.server import ThreadedMotoServer

from dmd2.lineage.companions import companions

BUCKET, TARGET = "results", "results/smoke/dmd2/student/metrics.json"
KEYS = {"access_key": "a", "secret_key": "b"}
ABOUT_ALL = {"results/costs.csv", "results/index.html"}  # written after a call about all jobs, so by none
OUTPUT = re.compile(r"^ {4}output: (.*)$", re.MULTILINE)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(address: str) -> Any:
    credentials = {"aws_access_key_id": "a", "aws_secret_access_key": "b"}
    store = boto3.resource("s3", endpoint_url=address, region_name="us-east-1", **credentials)
    return store.create_bucket(Bucket=BUCKET)


def options(address: str) -> list[str]:
    store = ["--default-storage-provider", "s3", "--default-storage-prefix", f"s3://{BUCKET}/run"]
    keys = [part for name, value in KEYS.items() for part in (f"--storage-s3-{name.replace('_', '-')}", value)]
    return [*store, "--storage-s3-endpoint-url", address, *keys]


def written(checkout: Checkout) -> set[str]:
    """All files that a finished run left in data/ and results/."""
    folders = (checkout / "data", checkout / "results")
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(checkout.folder)) for path in files}


def test_every_file_that_a_run_leaves_is_declared_or_a_companion_of_what_is(finished: Checkout) -> None:
    done = finished.snakemake("-n", "--forceall")
    assert done.returncode == 0, done.stdout
    listed = {item for line in OUTPUT.findall(done.stdout) for item in line.split(", ")}
    assert TARGET in listed
    declared = listed | {file for item in listed for file, _ in companions(item)}
    uncovered = {path for path in written(finished) if not {path, *map(str, Path(path).parents)} & declared}
    assert uncovered == ABOUT_ALL


def test_a_fresh_clone_goes_on_from_a_store_with_the_same_result(
    finished: Checkout, fresh: Checkout, address: str, bucket: Any, tmp_path: Path
) -> None:
    for path in written(finished):
        bucket.upload_file(str(finished / path), f"run/{path}")
    here = fresh.copy(tmp_path / "here")
    done = here.snakemake(TARGET, "-n", *options(address))
    assert NOTHING in done.stdout, done.stdout
    changed = here.snakemake(TARGET, "-n", *options(address), overlay={"train": {"seed": 5}})
    assert "rule train:" in changed.stdout, "records in the store are read when jobs are planned"

    for part in ("samples/", "metrics.json"):
        bucket.objects.filter(Prefix=f"run/results/smoke/dmd2/student/{part}").delete()
    done = here.snakemake(TARGET, "--cores", "1", *options(address))
    assert done.returncode == 0, done.stdout
    assert written(here) <= written(fresh) | ABOUT_ALL, "nothing is left on the disk"
    for name in ("samples/manifest.json", "metrics.json"):
        body = bucket.Object(f"run/results/smoke/dmd2/student/{name}").get()["Body"].read()
        made, before = json.loads(body), json.loads((finished / f"results/smoke/dmd2/student/{name}").read_text())
        for key in ("shards", "fid", "pixel_fd"):
            assert made.get(key) == before.get(key)
    stored = {item.key for item in bucket.objects.filter(Prefix="run/results/smoke/dmd2/student/samples/")}
    assert any(key.endswith("shard-00000.tar") for key in stored)
