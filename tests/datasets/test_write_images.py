"""Images become shards: by any number of processes, restarted, killed, and on a small disk."""

import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from events import wait_for_end, wait_until
from PIL import Image
from trees import data_of, write_tree

from dmd2.config import Data
from dmd2.datasets.images import PROBED, write_images
from dmd2.datasets.loader import Loader
from dmd2.datasets.reader import ShardReader
from dmd2.datasets.sources import open_source
from dmd2.errors import UserError
from dmd2.lineage.spec import Spec

NAMES = [f"n{label}/{number:02d}.png" for label in (1, 2) for number in range(10)]


@pytest.fixture
def data(tmp_path: Path) -> Data:
    """Twenty images in two classes, one of them damaged, for seven shards."""
    write_tree(tmp_path / "tree", NAMES)
    (tmp_path / "tree" / "n1" / "04.png").write_bytes(b"damaged")
    return data_of("image_folder", tmp_path / "tree", max_unreadable=1)


def spec_of(data: Data) -> Spec:
    return Spec.of("shards", "tree", data=data)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "provenance.json"}


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_shards_hold_the_sources_images_and_labels(image_format: str, data: Data, tmp_path: Path) -> None:
    data = data.model_copy(update={"image_format": image_format})
    manifest = tmp_path / "out" / "manifest.json"
    write_images(manifest, data, spec_of(data))
    raw, source = ShardReader(manifest).read(range(19)), open_source(data)
    kept = [position for position in range(20) if position != 4]
    for sample, position in enumerate(kept):
        np.testing.assert_array_equal(raw["image"][sample], source[position])
        assert raw["cls"][sample] == source.labels[position] == position // 10


def test_the_bytes_do_not_depend_on_the_number_of_processes(data: Data, tmp_path: Path) -> None:
    write_images(tmp_path / "one" / "manifest.json", data, spec_of(data), workers=1)
    counted: list[int] = []
    totals: list[int] = []

    def progress(total: int):
        totals.append(total)
        return counted.append

    write_images(tmp_path / "three" / "manifest.json", data, spec_of(data), workers=3, progress=progress)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert len(contents(tmp_path / "one")) == 17  # seven tars and sidecars, manifest, source, list of the damaged
    assert totals == [20]
    assert sorted(counted) == [2, 3, 3, 3, 3, 3, 3]


def test_the_command_takes_place_limit_and_processes(data: Data, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from dmd2.__main__ import app

    placeless = data.model_copy(update={"path": None, "max_unreadable": 0})
    spec, manifest = spec_of(placeless), tmp_path / "out" / "manifest.json"
    command = ["shards", "--spec", spec.to_json(), "--manifest", str(manifest)]
    for more, complaint in (([], "data.path is not set"), ([f"--source={data.path}"], "data.max_unreadable is 0")):
        stopped = CliRunner().invoke(app, [*command, *more])
        assert isinstance(stopped.exception, UserError)
        assert complaint in str(stopped.exception)
    done = CliRunner().invoke(app, [*command, f"--source={data.path}", "--max-unreadable", "1", "--workers", "2"])
    assert done.exit_code == 0, done.output
    assert len(ShardReader(manifest, spec.digest)) == 19


def test_a_changed_folder_is_written_again_under_the_same_configuration(data: Data, tmp_path: Path) -> None:
    manifest = tmp_path / "out" / "manifest.json"
    write_images(manifest, data, spec_of(data))
    (tmp_path / "tree" / "n1" / "00.png").rename(tmp_path / "tree" / "n1" / "99.png")  # the order of ids changes
    write_images(manifest, data, spec_of(data))
    np.testing.assert_array_equal(ShardReader(manifest).read([0])["image"][0], open_source(data)[0])


WRITER = """
import sys
from dmd2.config import Data
from dmd2.datasets.images import write_images
from dmd2.errors import UserError
from dmd2.lineage.spec import Spec

if __name__ == "__main__":
    data = Data.model_validate_json(sys.argv[1])
    try:
        write_images(sys.argv[2], data, Spec.of("shards", "tree", data=data), workers=2)
    except UserError as error:
        sys.exit(str(error))
"""


@pytest.fixture
def slow(tmp_path: Path) -> Data:
    """Thirty-two shards of large images, which take a few seconds."""
    (tmp_path / "tree" / "n1").mkdir(parents=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8)).save(tmp_path / "large.png")
    for number in range(64):
        os.link(tmp_path / "large.png", tmp_path / "tree" / "n1" / f"{number:02d}.png")
    return data_of("image_folder", tmp_path / "tree", num_classes=1, shard_size=2)


def started(data: Data, out: Path) -> subprocess.Popen[str]:
    """A writer in a process of its own that has finished a few shards."""
    script = out.parent / "writer.py"
    script.write_text(WRITER)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), data.model_dump_json(), str(out / "manifest.json")]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(list(out.glob("shard-*.json"))) >= 3, process)
    return process


def children(pid: int) -> list[int]:
    """The worker processes of `pid`: its children that are not multiprocessing's resource tracker."""
    tasks = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in tasks if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_after_a_kill_no_worker_goes_on_and_finished_shards_are_kept(slow: Data, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = started(slow, out)
    workers = children(process.pid)
    assert len(workers) == 2
    process.kill()
    process.communicate()
    wait_for_end(*workers)
    finished = {path.name: path.stat().st_ino for path in out.glob("shard-*.json")}
    assert 3 <= len(finished) < 32
    assert not (out / "manifest.json").exists()
    write_images(out / "manifest.json", slow, spec_of(slow), workers=2)
    now = {path.name: path.stat().st_ino for path in out.glob("shard-*.json")}
    assert {name: now[name] for name in finished} == finished
    assert len(now) == 32
    assert not list(out.glob(".*"))
    ShardReader(out / "manifest.json").verify()


def test_a_killed_worker_ends_the_writing_with_a_line_and_leaves_no_half_shard(slow: Data, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = started(slow, out)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    _, reported = process.communicate(timeout=60)
    assert process.returncode == 1
    assert reported.strip().startswith("a worker process was killed, perhaps out of memory; run again with fewer")
    assert len(reported.strip().splitlines()) == 1
    assert not (out / "manifest.json").exists()
    for sidecar in out.glob("shard-*.json"):
        assert sidecar.with_suffix(".tar").exists()


def test_an_error_in_a_worker_ends_the_others_and_is_reported_as_without_workers(data: Data, tmp_path: Path) -> None:
    strict = data.model_copy(update={"max_unreadable": 0})
    for workers in (1, 2):
        with pytest.raises(
            UserError, match=r"^1 of 20 images cannot be read.*: n1/04.png: not an image of a known format"
        ):
            write_images(tmp_path / str(workers) / "manifest.json", strict, spec_of(data), workers=workers)
    shutil.rmtree(tmp_path / "tree" / "n2")
    source_gone = r"n2/.*: cannot be read \(No such file"
    with pytest.raises(UserError, match=f"1 classes, but|{source_gone}"):
        write_images(tmp_path / "3" / "manifest.json", data, spec_of(data), workers=2)


Usage = namedtuple("Usage", "total used free")


def test_too_small_a_disk_is_refused_before_the_start(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write_images(out / "manifest.json", data, spec_of(data))
    taken = sum(path.stat().st_size for path in out.glob("shard-*.tar"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 10_000))
    assert write_images(out / "manifest.json", data, spec_of(data))["num_samples"] == 19  # they are there already
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(
        UserError, match=r"the shards of 20 images need about 0.0 GB more, but 0.0 GB are free; make room"
    ):
        write_images(elsewhere / "manifest.json", data, spec_of(data))
    assert list(elsewhere.iterdir()) == []
    room = int(1.2 * taken)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, room))
    assert write_images(elsewhere / "manifest.json", data, spec_of(data))["num_samples"] == 19
    assert PROBED > 20  # the estimate above rests on every image


def test_one_shard_serves_four_ranks(data: Data, tmp_path: Path) -> None:
    whole = data.model_copy(update={"shard_size": 1000})
    manifest = tmp_path / "out" / "manifest.json"
    assert len(write_images(manifest, whole, spec_of(whole))["shards"]) == 1
    ranks = [Loader(manifest, batch_size=2, seed=0, rank=rank, world=4) for rank in range(4)]
    alone = Loader(manifest, batch_size=8, seed=0)
    for step in range(10):
        together = np.concatenate([loader.batch(step)["image"] for loader in ranks])
        np.testing.assert_array_equal(together, alone.batch(step)["image"])
