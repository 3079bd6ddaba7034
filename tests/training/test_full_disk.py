"""A disk that fills up: one line, nothing lost, and the next run goes on."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from trainees import DIGEST, RUNTIME, Source, assert_same_state, distillation

import dmd2.training.checkpoint_format
from dmd2.errors import UserError
from dmd2.training.checkpoint_store import CheckpointStore, save_weights
from dmd2.training.loop import fit

SIZE_KIB = 4096


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_KIB}k", "tmpfs", str(folder)]
    allowed = os.geteuid() == 0 and shutil.which("mount") is not None
    if not allowed or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, spare_kib: int) -> Path:
    free = shutil.disk_usage(folder).free // 1024
    ballast = folder / "ballast"
    ballast.write_bytes(b"\0" * 1024 * (free - spare_kib))
    return ballast


def test_checkpoint_that_does_not_fit_leaves_the_one_before(small_disk: Path):
    with CheckpointStore(small_disk / "state", DIGEST) as store:
        store.save(1, {"x": torch.ones(1000)})
        with pytest.raises(
            UserError, match=r"step-00000002-0\.safetensors: could not be written, \d+ MiB are free"
        ) as error:
            store.save(2, {"x": torch.ones(1000 * SIZE_KIB)})
        assert "\n" not in str(error.value)
        assert list(store.folder.glob(".*.tmp")) == []
        found = store.load()
    assert found is not None
    assert found[1]["step"] == 1
    assert torch.equal(found[0]["x"], torch.ones(1000))


def test_weights_that_do_not_fit_leave_the_file_before(small_disk: Path):
    path = small_disk / "w.safetensors"
    save_weights(path, {"x": torch.ones(10)})
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"w\.safetensors: could not be written"):
        save_weights(path, {"x": torch.ones(1000 * SIZE_KIB)})
    assert path.read_bytes() == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_run_on_a_full_disk_stops_and_goes_on_when_there_is_space(small_disk: Path, latents: Path, tmp_path: Path):
    def run(folder: Path, iterations: int = 12) -> Any:
        trainee = distillation(Source(latents))
        with CheckpointStore(folder, DIGEST) as store:
            fit(trainee, iterations, store, RUNTIME, title="test")
        return trainee

    run(small_disk / "state", 4)
    ballast = fill(small_disk, spare_kib=8)
    with pytest.raises((UserError, OSError)) as error:
        run(small_disk / "state")
    assert isinstance(error.value, UserError) or error.value.errno == errno.ENOSPC
    ballast.unlink()
    trainee = run(small_disk / "state")
    assert_same_state(trainee.state_dict(), run(tmp_path / "elsewhere").state_dict())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nbacktrace"),
    ],
    ids=["system", "torch"],
)
def test_every_way_in_which_a_write_fails_is_one_line(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> None:
        raise error

    with CheckpointStore(tmp_path, DIGEST) as store:
        store.save(1, {"x": torch.ones(3)})
        monkeypatch.setattr(dmd2.training.checkpoint_format, "save_file", fail)
        with pytest.raises(UserError, match=r"could not be written.*free space and run the same command") as caught:
            store.save(2, {"x": torch.ones(3)})
        assert "\n" not in str(caught.value)
        assert sorted(path.name for path in tmp_path.glob("step-*")) == [
            "step-00000001-0.safetensors",
            "step-00000001.json",
        ]
