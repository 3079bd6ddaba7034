"""Checkpoints: what is kept, what is refused, and what a damaged one leads to."""

import errno
import fcntl
import logging
import os
import pickle
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from events import wait_until
from forked import start
from safetensors.torch import load_file
from toy import DIGEST, assert_equal

import dmd2.training.checkpoint_store
from dmd2.errors import UserError
from dmd2.files import read_json, sha256, write_json
from dmd2.training.checkpoint_format import seal
from dmd2.training.checkpoint_store import CheckpointStore, save_weights


def state(step: int) -> dict[str, Any]:
    """A state with what optimizers hold: tensors, numbers, lists and numbered parts."""
    values = torch.randn(40, generator=torch.Generator().manual_seed(step))
    return {"weight": values, "optimizer": {"state": {0: {"step": torch.tensor(step)}}, "groups": [{"lr": 0.1 * step}]}}


def store(folder: Path, **options: Any) -> CheckpointStore:
    return CheckpointStore(folder / "state", DIGEST, warn=logging.getLogger("test"), **options)


@pytest.fixture
def saved(tmp_path: Path) -> CheckpointStore:
    """A store, entered no more, with checkpoints after 3, 6 and 9 iterations."""
    with store(tmp_path, keep=3) as found:
        for step in (3, 6, 9):
            found.save(step, state(step), wall_s=float(step))
    return found


def test_checkpoint_comes_back_with_its_facts(saved: CheckpointStore):
    found = saved.load()
    assert found is not None
    assert_equal(found[0], state(9))
    assert {key: found[1][key] for key in ("step", "digest", "wall_s")} == {"step": 9, "digest": DIGEST, "wall_s": 9.0}


def test_folder_that_never_had_a_checkpoint_gives_none(tmp_path: Path):
    with store(tmp_path) as found:
        assert found.load() is None


def test_only_the_newest_are_kept(tmp_path: Path):
    with store(tmp_path, keep=2) as found:
        for step in (1, 2, 3, 4, 10):
            found.save(step, state(step))
    names = sorted(path.name for path in (tmp_path / "state").glob("step-*"))
    assert names == [
        "step-00000004-0.safetensors",
        "step-00000004.json",
        "step-00000010-0.safetensors",
        "step-00000010.json",
    ]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(**changes: Any) -> Callable[[Path], object]:
    """A manifest that says something else, and is whole."""
    return lambda path: write_json(path, seal({**read_json(path), **changes}))


PART, MANIFEST = "-0.safetensors", ".json"
DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "truncated": (PART, truncate),
    "flipped bit": (PART, flip_a_bit),
    "emptied": (PART, lambda path: path.write_bytes(b"")),
    "deleted": (PART, Path.unlink),
    "truncated JSON": (MANIFEST, truncate),
    "JSON without files": (MANIFEST, lambda path: write_json(path, {"step": 9, "digest": DIGEST})),
    "JSON without a checksum": (MANIFEST, edit(files=[{"file": "step-00000009-0.safetensors"}])),
    "JSON with another step": (
        MANIFEST,
        lambda path: path.write_text(path.read_text().replace('"step": 9', '"step": 8')),
    ),
    "JSON that names a tensor too many": (MANIFEST, edit(state={"map": [["x", {"tensor": "/x"}]]})),
    "JSON that names a file elsewhere": (MANIFEST, edit(files=[{"file": "../step-00000009-0.safetensors"}])),
    "JSON that is a list": (MANIFEST, lambda path: path.write_text("[1]")),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_newest_falls_back_to_the_one_before_with_a_warning(
    name: str, saved: CheckpointStore, caplog: pytest.LogCaptureFixture
):
    suffix, damage = DAMAGES[name]
    damage(saved.folder / f"step-00000009{suffix}")
    found = saved.load()
    assert found is not None
    assert found[1]["step"] == 6
    assert_equal(found[0], state(6))
    (record,) = caplog.records
    assert "step-00000009" in record.message
    assert "falling back" in record.message


def test_two_damaged_checkpoints_fall_back_twice(saved: CheckpointStore, caplog: pytest.LogCaptureFixture):
    truncate(saved.folder / "step-00000009-0.safetensors")
    flip_a_bit(saved.folder / "step-00000006-0.safetensors")
    found = saved.load()
    assert found is not None
    assert found[1]["step"] == 3
    assert len(caplog.records) == 2


def test_all_damaged_is_an_error_and_no_restart(saved: CheckpointStore):
    for path in saved.folder.glob("step-*.safetensors"):
        truncate(path)
    with pytest.raises(UserError, match=r"missing or damaged; restore one, or delete the folder"):
        saved.load()


def test_deleted_checkpoints_are_an_error_and_no_restart(saved: CheckpointStore):
    for path in saved.folder.glob("step-*"):
        path.unlink()
    with pytest.raises(UserError, match=f"{re.escape(str(saved.folder))}.*missing or damaged"):
        saved.load()


def test_checkpoint_of_another_configuration_is_refused(saved: CheckpointStore):
    other = CheckpointStore(saved.folder, "f" * 16)
    with pytest.raises(UserError, match=f"written under configuration {DIGEST}, not {'f' * 16}"):
        other.load()


def test_foreign_newest_is_refused_though_an_own_one_is_there(saved: CheckpointStore):
    edit(digest="e" * 16)(saved.folder / "step-00000009.json")
    with pytest.raises(UserError, match="written under configuration " + "e" * 16):
        saved.load()


class Trap:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("sprung"),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_checkpoint_that_carries_code_does_not_run_it(
    saved: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    path, manifest = saved.folder / "step-00000009-0.safetensors", saved.folder / "step-00000009.json"
    for write in (lambda: torch.save({"x": Trap()}, path), lambda: path.write_bytes(pickle.dumps(Trap()))):
        write()
        entry = {"file": path.name, "sha256": sha256(path), "bytes": path.stat().st_size, "rows": {}}
        edit(files=[entry])(manifest)
        found = saved.load()
        assert found is not None
        assert found[1]["step"] == 6
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("cut", ["step-00000009.json", "newest.json"])
def test_write_that_is_cut_off_anywhere_leaves_a_good_checkpoint(
    cut: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def crash(path: Path, value: Any) -> None:
        if path.name == cut and value["step"] == 9:
            raise KeyboardInterrupt
        write_json(path, value)

    monkeypatch.setattr(dmd2.training.checkpoint_store, "write_json", crash)
    with store(tmp_path) as found:
        found.save(6, state(6))
        with pytest.raises(KeyboardInterrupt):
            found.save(9, state(9))
        loaded = found.load()
    assert loaded is not None
    step = 9 if cut == "newest.json" else 6
    assert loaded[1]["step"] == step
    assert_equal(loaded[0], state(step))


def hold(folder: str) -> None:
    with CheckpointStore(folder, DIGEST):
        (Path(folder) / "held").touch()
        signal.pause()


def test_second_process_is_refused_naming_the_first_until_that_dies(tmp_path: Path):
    holder = start(hold, str(tmp_path / "state"))
    wait_until((tmp_path / "state" / "held").exists, holder)
    with pytest.raises(UserError, match=rf"state: in use by process {holder.pid} on \S+ since 20"), store(tmp_path):
        pass
    holder.kill()
    holder.join()
    with store(tmp_path) as found:
        assert read_json(found.folder / "owner.json")["pid"] == os.getpid()


def test_second_store_in_one_process_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with store(tmp_path):
        with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on .*, job 4711"), store(tmp_path):
            pass
        (tmp_path / "state" / "owner.json").unlink()
        with pytest.raises(UserError, match="in use by another process"), store(tmp_path):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_refused_with_the_file(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def no_locks(file: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(UserError, match=rf"^{tmp_path}/state/lock: this file system has no locks .* another disk"):
        store(tmp_path).__enter__()
    assert not (tmp_path / "state" / "owner.json").exists()


def test_other_ranks_enter_beside_the_one_that_holds_the_lease(
    saved: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with store(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with store(tmp_path) as second:
            found = second.load()
        assert found is not None
        assert found[1]["step"] == 9
        monkeypatch.delenv("RANK")
        with pytest.raises(UserError, match="in use"), store(tmp_path):
            pass


def test_clearing_removes_all_and_a_cut_off_clearing_stops_no_later_run(
    saved: CheckpointStore, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dmd2.training.checkpoint_store.shutil, "rmtree", lambda folder, **_: None)
    saved.clear()
    for path in saved.folder.glob("step-*"):
        path.unlink()
    assert saved.load() is None
    monkeypatch.undo()
    saved.clear()
    assert not saved.folder.exists()


def test_weights_come_back_as_they_were(tmp_path: Path):
    weights = {"a": torch.randn(3, 4).T, "b": torch.tensor(1.5), "c": torch.ones(2, dtype=torch.bfloat16)}
    save_weights(tmp_path / "w.safetensors", weights)
    assert_equal(load_file(tmp_path / "w.safetensors"), weights)


def test_checkpoint_below_damaged_ones_stays_and_they_go(tmp_path: Path):
    with store(tmp_path, keep=2) as found:
        for step in (3, 6, 9):
            found.save(step, state(step))
        for step in (6, 9):
            truncate(found.folder / f"step-{step:08d}-0.safetensors")
        found.save(4, state(4))  # the run began anew, say, and was stopped soon
        loaded = found.load()
    assert loaded is not None
    assert loaded[1]["step"] == 4
    assert [path.name for path in found.folder.glob("step-*.json")] == ["step-00000004.json"]
