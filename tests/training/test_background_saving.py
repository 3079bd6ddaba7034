"""Writing beside the training: the loop goes on, nothing is lost or mixed up, and what goes wrong comes to light."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from toy import DIGEST

from dmd2.config import Runtime
from dmd2.errors import UserError
from dmd2.training import checkpoint_format
from dmd2.training.background import Background
from dmd2.training.checkpoint_store import CheckpointStore
from dmd2.training.loop import fit
from dmd2.training.optimizer import FiniteGuard

WAIT_S = 30.0


class Counting:
    """A trainee whose weight counts its steps, in place; `at` is called at steps of its own."""

    def __init__(self, at: dict[int, Callable[[], object]] | None = None) -> None:
        self.guard = FiniteGuard(torch.device("cpu"))
        self.count = torch.zeros(3)
        self.at = at or {}

    def step(self, index: int) -> dict[str, Tensor]:
        self.count += 1
        self.at.get(index, bool)()
        return {"loss": torch.tensor(0.0)}

    def export(self) -> dict[str, Tensor]:
        return {"count": self.count}

    state_dict = export

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count.copy_(state["count"])


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writes of checkpoints wait until it is opened."""
    gate, write = threading.Event(), checkpoint_format.write_part

    def slow(*arguments: Any) -> None:
        assert gate.wait(WAIT_S), "nobody opened the gate: training waited for the writer"
        write(*arguments)

    monkeypatch.setattr(checkpoint_format, "write_part", slow)
    return gate


def store(folder: Path, **options: Any) -> CheckpointStore:
    return CheckpointStore(folder, DIGEST, keep=100, in_background=True, **options)


def run(folder: Path, trainee: Counting, iterations: int, every: int, snapshots: tuple[int, ...] = ()) -> None:
    with store(folder) as entered:
        runtime = Runtime(log_every=1, checkpoint_every=every)
        fit(trainee, iterations, entered, runtime, title="test", snapshots=snapshots)


def steps(folder: Path) -> list[int]:
    return sorted(int(path.stem[5:]) for path in folder.glob("step-*.json"))


def test_training_goes_on_while_a_checkpoint_is_written(gate: threading.Event, tmp_path: Path):
    """The writer of the checkpoint after step 4 gets through only because step 7 is reached."""
    seen: list[list[int]] = []

    def open_gate() -> None:
        seen.append(steps(tmp_path))
        gate.set()

    run(tmp_path, Counting({6: open_gate}), 10, every=4)
    assert seen == [[]], "three steps were made before the first checkpoint was there"
    assert steps(tmp_path) == [4, 8, 10]


def test_what_is_written_is_the_state_of_its_step_and_not_of_a_later_one(gate: threading.Event, tmp_path: Path):
    run(tmp_path, Counting({6: gate.set}), 7, every=4, snapshots=(3,))
    found = load_file(tmp_path / "step-00000004-0.safetensors")
    assert [value.tolist() for value in found.values()] == [[4.0] * 3]
    assert load_file(tmp_path / "snapshot-00000003.safetensors")["count"].tolist() == [3.0] * 3


def test_at_most_one_checkpoint_is_under_way(gate: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The gate is opened by the wait for the first."""
    trainee, reached = Counting(), []
    trainee.at = {index: lambda i=index: reached.append(i) for index in range(12)}
    wait = Background.wait

    def opening(self: Background) -> None:
        first = bool(self._open) and not gate.is_set()
        if first:
            reached.append("open")
            gate.set()
        wait(self)
        if first:
            reached.append(steps(tmp_path))

    monkeypatch.setattr(Background, "wait", opening)
    run(tmp_path, trainee, 12, every=4)
    assert reached == [*range(8), "open", [4], *range(8, 12)], "the second waited for the first, and the steps for both"


def test_without_background_every_save_is_on_disk_when_it_returns(tmp_path: Path):
    with CheckpointStore(tmp_path, DIGEST) as entered:
        entered.save(1, {"x": torch.ones(2)})
        assert steps(tmp_path) == [1]


@pytest.mark.parametrize("end", ["next step", "last step"])
def test_write_that_fails_stops_the_run_with_its_error(end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    failed, do = threading.Event(), Background.do

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def watched(self: Background, call: Callable[[], None]) -> None:
        do(self, call)
        self._open[-1].add_done_callback(lambda _: failed.set())

    monkeypatch.setattr(checkpoint_format, "write_part", fail)
    monkeypatch.setattr(Background, "do", watched)
    trainee = Counting({5: lambda: failed.wait(WAIT_S)} if end == "next step" else {})
    iterations = 100 if end == "next step" else 4
    with pytest.raises(UserError, match=r"step-00000004-0\.safetensors: could not be written.*free space"):
        run(tmp_path, trainee, iterations, every=4)
    assert trainee.count[0] < 10, "it did not train on for nothing"
    assert steps(tmp_path) == []


def test_error_of_a_step_waits_for_the_checkpoint_under_way(
    gate: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail() -> None:
        raise UserError("a step went wrong")

    end = Background.end
    monkeypatch.setattr(Background, "end", lambda self: (gate.set(), end(self)))
    with pytest.raises(UserError, match="a step went wrong"):
        run(tmp_path, Counting({5: fail}), 10, every=4)
    assert steps(tmp_path) == [4]


def test_snapshot_appears_before_a_checkpoint_that_was_saved_after_it(
    gate: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    snapshot, write, there = tmp_path / "snapshot.safetensors", checkpoint_format.write_part, []

    def noted(*arguments: Any) -> None:
        there.append(snapshot.exists())
        write(*arguments)

    monkeypatch.setattr(checkpoint_format, "write_part", noted)
    with store(tmp_path) as entered:
        entered.save(1, {"x": torch.ones(1)})
        entered.save_weights("snapshot", {"x": torch.ones(1)})
        assert not snapshot.exists()
        gate.set()
        entered.save(2, {"x": torch.ones(1)})
    assert there == [False, True]


def test_files_that_a_killed_process_left_without_a_manifest_are_removed(tmp_path: Path):
    with store(tmp_path) as entered:
        entered.save(1, {"x": torch.ones(1)})
    for name in ("step-00000002-0.safetensors", "step-00000002-1.part", ".step-00000002-1.safetensors.a.tmp"):
        (tmp_path / name).touch()
    (tmp_path / "snapshot-00000002.safetensors").touch()
    with store(tmp_path) as entered:
        assert entered.load() is not None
    names = {path.name for path in tmp_path.iterdir()} - {"lock", "owner.json", "newest.json"}
    assert names == {"step-00000001-0.safetensors", "step-00000001.json", "snapshot-00000002.safetensors"}


def test_part_that_never_comes_is_an_error_and_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match=r"step-00000003-1\.safetensors: rank 1 has not written its part"):
        waits_for_rank_1(tmp_path, monkeypatch, patience_minutes=0.2 / 60)
    assert steps(tmp_path) == []


def test_waiting_for_a_part_ends_when_the_run_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="rank 1 is lost"):
        waits_for_rank_1(tmp_path, monkeypatch, fails=True, patience_minutes=1e6)
    assert steps(tmp_path) == []


def waits_for_rank_1(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, fails: bool = False, patience_minutes: float = 10.0
) -> None:
    """Saves a state that the first of two ranks takes for sharded, so that its manifest needs the other's part."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("dmd2.training.checkpoint_store.layout_of", lambda tensors: {"/x": [2]})
    with store(folder, patience_minutes=patience_minutes) as entered:
        entered.save(3, {"x": torch.ones(2)})
        if fails:
            raise UserError("rank 1 is lost")


def test_background_drops_nothing_and_tells_the_first_error():
    done: list[int] = []
    work = Background()
    for number in range(5):
        work.do(lambda n=number: done.append(n))
    work.wait()
    assert done == [0, 1, 2, 3, 4]
    work.do(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    work.do(lambda: done.append(5))
    with pytest.raises(ZeroDivisionError):
        work.wait()
    work.check()
    work.end()
    assert done[-1] == 5
