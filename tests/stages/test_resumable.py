"""Files of a job that several processes make: who makes which, and that nobody waits for the dead for ever."""

import logging
import os
from pathlib import Path

import pytest

from dmd2.errors import UserError
from dmd2.lineage.spec import Spec
from dmd2.stages.resumable import ResumableFiles

NAMES = [f"part-{i}" for i in range(5)]
SPEC = Spec.of("metrics", "teacher/ode")


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch):
    def set_rank(rank: int, world: int) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))

    return set_rank


def shares(folder: Path, *contents: str) -> ResumableFiles:
    return ResumableFiles(folder, SPEC, contents, NAMES)


def exists(path: Path) -> None:
    assert path.exists()


def test_each_file_is_made_by_one_process(tmp_path: Path, as_rank):
    made = []
    for rank in range(3):
        as_rank(rank, 3)
        for number, path in shares(tmp_path).mine(exists):
            path.write_text(str(rank))
            made.append(number)
    assert sorted(made) == list(range(5))
    as_rank(0, 3)
    shares(tmp_path).wait(0.0)  # nothing to wait for


def test_finished_files_are_kept_by_any_number_of_processes(tmp_path: Path, as_rank):
    as_rank(0, 1)
    for number, path in shares(tmp_path).mine(exists):
        path.touch()
        if number == 2:
            break
    as_rank(1, 2)
    assert [number for number, _ in shares(tmp_path).mine(exists)] == [3]
    as_rank(0, 2)
    assert [number for number, _ in shares(tmp_path).mine(exists)] == [4]


def test_damaged_file_is_made_again_with_a_warning(tmp_path: Path, as_rank, caplog: pytest.LogCaptureFixture):
    as_rank(0, 1)
    for _, path in shares(tmp_path).mine(exists):
        path.touch()

    def damaged(path: Path) -> None:
        if path.name == "part-3":
            raise UserError(f"{path}: damaged")

    with caplog.at_level(logging.WARNING):
        assert [number for number, _ in shares(tmp_path).mine(damaged)] == [3]
    assert "part-3: damaged; it is written again" in caplog.text


def test_other_inputs_mean_another_folder(tmp_path: Path):
    assert shares(tmp_path, "a").folder == shares(tmp_path, "a").folder
    assert shares(tmp_path, "a").folder != shares(tmp_path, "b").folder
    assert shares(tmp_path, "a", "b").folder != shares(tmp_path, "ab").folder


def test_silent_process_ends_the_wait_with_an_error(tmp_path: Path, as_rank):
    as_rank(1, 2)
    other = shares(tmp_path)
    next(other.mine(exists))  # it begins, and is heard of no more
    as_rank(0, 2)
    mine = shares(tmp_path)
    for _, path in mine.mine(exists):
        path.touch()
    with pytest.raises(UserError, match=r"part-1: rank 1 had no heartbeat for 0\.01 minutes .*run the same command"):
        mine.wait(0.01)


def test_process_that_moves_is_waited_for(tmp_path: Path, as_rank, monkeypatch: pytest.MonkeyPatch):
    as_rank(0, 2)
    mine = shares(tmp_path)
    for _, path in mine.mine(exists):
        path.touch()
    beats = iter(range(1, 100))
    rank_1 = mine.folder / "rank-1.alive"

    def other_works(_: float) -> None:
        beat = next(beats)
        rank_1.touch()
        os.utime(rank_1, (beat, beat))
        if beat == 30:
            mine.paths[1].touch()
            mine.paths[3].touch()

    clock = iter(range(0, 10_000, 20))  # seconds: a beat each 20 s, and patience for 30
    monkeypatch.setattr("dmd2.stages.resumable.time.sleep", other_works)
    monkeypatch.setattr("dmd2.stages.resumable.time.monotonic", lambda: next(clock))
    mine.wait(0.5)
    assert next(beats) > 30


def test_damaged_file_of_another_process_is_waited_for_like_a_missing_one(
    tmp_path: Path, as_rank, monkeypatch: pytest.MonkeyPatch
):
    as_rank(0, 2)
    mine = shares(tmp_path)
    for _, path in mine.mine(exists):
        path.write_text("whole")
    for number in (1, 3):
        mine.paths[number].write_text("cut off")

    def whole(path: Path) -> None:
        if path.read_text() != "whole":
            raise UserError(f"{path}: damaged")

    waits = iter(range(100))

    def other_works(_: float) -> None:
        if next(waits) == 5:
            mine.paths[1].write_text("whole")
            mine.paths[3].write_text("whole")

    monkeypatch.setattr("dmd2.stages.resumable.time.sleep", other_works)
    mine.wait(10.0, whole)
    assert next(waits) == 6
