import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numbered import numbered

from dmd2 import files
from dmd2.config import Data
from dmd2.datasets.reader import ShardReader
from dmd2.datasets.shards import read_manifest, write_shards
from dmd2.errors import UserError
from dmd2.lineage.spec import Spec

Write = Callable[..., Path]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the one that says when the set was made."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "provenance.json"}


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob("*.tar")}


def test_the_same_input_gives_the_same_bytes(write: Write) -> None:
    first, second = write(folder="one"), write(folder="two")
    assert contents(first.parent) == contents(second.parent)
    assert len(contents(first.parent)) == 7  # three tars with their sidecars, and the manifest


def test_batches_within_a_shard_do_not_change_the_bytes(write: Write) -> None:
    whole, parts = write(folder="one"), write(folder="two", batch_size=3)
    assert contents(whole.parent) == contents(parts.parent)


def test_manifest_tells_counts_sizes_checksums_and_origin(write: Write, spec: Spec, tmp_path: Path) -> None:
    manifest = read_manifest(write(facts={"codec": "none"}), spec.digest)
    assert [(s["start"], s["count"]) for s in manifest["shards"]] == [(0, 10), (10, 10), (20, 3)]
    assert manifest["num_samples"] == 23
    assert manifest["fields"] == {
        "cls": {"dtype": "int64", "shape": []},
        "latent.npy": {"dtype": "float16", "shape": [3]},
    }
    assert manifest["facts"] == {"codec": "none"}
    assert manifest["provenance"] == {"stage": "shards", "name": "numbered", "digest": spec.digest}
    made = files.read_json(tmp_path / "set" / "provenance.json")
    assert made["spec"] == json.loads(spec.to_json())
    assert made["created"].startswith("20")


KILLED_WRITER = """
import os, signal, sys
from dmd2.datasets.shards import write_shards
from dmd2.lineage.spec import read_spec
from numbered import numbered

def make(ids):
    if 24 in ids:
        os.kill(os.getpid(), signal.SIGKILL)
    return numbered(ids)

write_shards(sys.argv[1], 40, 10, make, read_spec(sys.argv[2]), batch_size=3)
"""


def test_a_restart_after_a_kill_keeps_finished_shards_and_redoes_the_rest(
    write: Write, spec: Spec, tmp_path: Path
) -> None:
    manifest = tmp_path / "set" / "manifest.json"
    command = [sys.executable, "-c", KILLED_WRITER, str(manifest), spec.to_json()]
    done = subprocess.run(command, cwd=Path(__file__).parent, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    finished = identities(manifest.parent)
    assert sorted(finished) == ["shard-00000.tar", "shard-00001.tar"]
    assert len(list(manifest.parent.glob(".shard-00002.tar.*.tmp"))) == 1
    assert not manifest.exists()

    write(40, folder="set", batch_size=3)
    now = identities(manifest.parent)
    assert {name: now[name] for name in finished} == finished
    assert not list(manifest.parent.glob(".*"))
    assert contents(manifest.parent) == contents(write(40, folder="uninterrupted").parent)


def test_a_damaged_shard_is_redone_and_the_others_kept(write: Write) -> None:
    manifest = write()
    before, bytes_before = identities(manifest.parent), contents(manifest.parent)
    damaged = manifest.parent / "shard-00001.tar"
    damaged.write_bytes(damaged.read_bytes()[:-512] + bytes([1]) * 512)
    (manifest.parent / "shard-00002.json").write_text("{")
    write()
    after = identities(manifest.parent)
    assert {name for name in before if before[name] != after[name]} == {"shard-00001.tar", "shard-00002.tar"}
    assert contents(manifest.parent) == bytes_before


@pytest.mark.parametrize("what", ["digest", "inputs"])
def test_shards_of_another_configuration_or_input_are_not_reused(
    what: str, write: Write, spec: Spec, digits: Data
) -> None:
    manifest = write(inputs="a")
    before = identities(manifest.parent)
    other = Spec.of("shards", "numbered", data=digits.model_copy(update={"levels": 16})) if what == "digest" else spec

    def doubled(ids: range) -> dict[str, Any]:
        fields = numbered(ids)
        return {**fields, "latent.npy": 2 * fields["latent.npy"]}

    write_shards(manifest, 23, 10, doubled, other, inputs="a" if what == "digest" else "b")
    assert all(before[name] != now for name, now in identities(manifest.parent).items())
    np.testing.assert_array_equal(ShardReader(manifest).read([22])["latent"], [[44, 44.5, 45]])


def test_a_manifest_of_another_configuration_is_refused(write: Write, digits: Data) -> None:
    manifest = write()
    other = Spec.of("shards", "numbered", data=digits.model_copy(update={"levels": 16}))
    with pytest.raises(UserError, match=rf"manifest.json.*expects {other.digest}.*delete"):
        read_manifest(manifest, other.digest)


def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path) -> None:
    files.write_json(tmp_path / "manifest.json", {"num_samples": 3})
    with pytest.raises(UserError, match=r"manifest.json: not a shard manifest of format 1; delete it"):
        read_manifest(tmp_path / "manifest.json")


def test_while_shards_are_being_rewritten_there_is_no_manifest(write: Write, spec: Spec) -> None:
    manifest = write()

    def dies(ids: range) -> dict[str, Any]:
        raise RuntimeError("teacher failed")

    with pytest.raises(RuntimeError, match="teacher failed"):
        write_shards(manifest, 23, 10, dies, spec, inputs="changed")
    assert not manifest.exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_with_the_sample(bad: float, write: Write, spec: Spec) -> None:
    manifest = write()
    shutil.rmtree(manifest.parent)

    def make(ids: range) -> dict[str, Any]:
        fields = numbered(ids)
        fields["latent.npy"][[i == 17 for i in ids], 1] = bad
        return fields

    with pytest.raises(UserError, match=r"sample 17: `latent.npy`: holds NaN or infinity"):
        write_shards(manifest, 23, 10, make, spec)
    assert sorted(p.name for p in manifest.parent.iterdir()) == ["shard-00000.json", "shard-00000.tar"]


def test_a_sample_of_another_shape_is_refused_with_its_number(tmp_path: Path, spec: Spec) -> None:
    def make(ids: range) -> dict[str, Any]:
        return {"x0.npy": [np.zeros(3 if i != 4 else 2, np.float32) for i in ids]}

    with pytest.raises(UserError, match=r"sample 4: `x0.npy`: float32 of shape \(2,\)"):
        write_shards(tmp_path / "manifest.json", 6, 3, make, spec)


def test_shards_whose_fields_differ_get_no_manifest(tmp_path: Path, spec: Spec) -> None:
    def make(ids: range) -> dict[str, Any]:
        return {"x0.npy": np.zeros((len(ids), 2 if ids.start == 0 else 3), np.float32)}

    with pytest.raises(UserError, match=r"shard-00001.tar: its fields"):
        write_shards(tmp_path / "manifest.json", 6, 3, make, spec)
    assert not (tmp_path / "manifest.json").exists()


def test_too_few_values_for_the_ids_are_a_bug_of_the_caller(tmp_path: Path, spec: Spec) -> None:
    with pytest.raises(ValueError, match="cls: 2 values for samples 0 to 2"):
        write_shards(tmp_path / "manifest.json", 3, 3, lambda ids: {"cls": [1, 2]}, spec)


def test_a_file_size_limit_leaves_no_half_shard_and_names_the_file(write: Write) -> None:
    manifest = write(10)  # one shard that fits
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=r"shard-00000.tar: could not be written \(File too large\); make room"):
            write(400, size=200, folder="large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    assert list((manifest.parents[1] / "large").iterdir()) == []


def test_a_full_disk_leaves_no_half_shard_and_keeps_the_finished_ones(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushes = 0

    def full(descriptor: int) -> None:
        nonlocal flushes
        flushes += 1
        if flushes == 3:  # a tar, its sidecar, the next tar
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"set/shard-00001.tar: could not be written \(No space left on device\)"):
        write()
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == ["shard-00000.json", "shard-00000.tar"]
    monkeypatch.undo()
    assert len(ShardReader(write())) == 23


def test_other_errors_of_the_maker_are_not_called_a_full_disk(tmp_path: Path, spec: Spec) -> None:
    def make(ids: range) -> dict[str, Any]:
        raise FileNotFoundError(errno.ENOENT, "No such file", "weights.pt")

    with pytest.raises(FileNotFoundError, match=r"weights.pt"):
        write_shards(tmp_path / "manifest.json", 3, 3, make, spec)


def test_several_ranks_write_the_set_that_one_rank_writes(write: Write, tmp_path: Path, spec: Spec) -> None:
    alone = write(45, folder="alone")
    manifest, meeting, made = tmp_path / "together" / "manifest.json", threading.Barrier(3, timeout=20), []

    def run(rank: int) -> dict[str, Any]:
        def make(ids: range) -> dict[str, Any]:
            made.append((rank, ids.start))
            return numbered(ids)

        return write_shards(manifest, 45, 10, make, spec, rank=rank, world=3, barrier=meeting.wait)

    with ThreadPoolExecutor(3) as pool:
        manifests = list(pool.map(run, range(3)))
    assert sorted(made) == [(0, 0), (0, 30), (1, 10), (1, 40), (2, 20)]
    assert contents(manifest.parent) == contents(alone.parent)
    assert [m["shards"] for m in manifests] == 3 * [read_manifest(alone)["shards"]]


def test_the_manifest_is_refused_while_a_rank_has_not_written_its_shards(tmp_path: Path, spec: Spec) -> None:
    manifest = tmp_path / "manifest.json"
    with pytest.raises(UserError, match="shard-00001"):
        write_shards(manifest, 30, 10, numbered, spec, rank=0, world=2, barrier=lambda: None)
    assert not manifest.exists()


def test_several_ranks_without_a_barrier_are_refused(tmp_path: Path, spec: Spec) -> None:
    with pytest.raises(ValueError, match="barrier"):
        write_shards(tmp_path / "manifest.json", 30, 10, numbered, spec, world=2)


def test_the_check_sees_each_shards_first_batch_and_its_facts_survive_a_restart(write: Write) -> None:
    seen: list[range] = []

    def check(ids: range, fields: Any) -> dict[str, Any]:
        seen.append(ids)
        return {"first": float(fields["latent.npy"][0, 0])}

    manifest = write(batch_size=4, check=check)
    assert seen == [range(4), range(10, 14), range(20, 23)]
    write(batch_size=4, check=check)
    assert len(seen) == 3
    assert [s["facts"] for s in read_manifest(manifest)["shards"]] == [{"first": 0}, {"first": 10}, {"first": 20}]


def test_progress_adds_up_to_the_set_also_when_shards_are_kept(write: Write) -> None:
    for _ in range(2):
        done: list[int] = []
        write(progress=done.append)
        assert done == [10, 10, 3]
