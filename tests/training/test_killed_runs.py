"""A run that is killed and resumed, again and again, ends where the uninterrupted one ends, to the last bit."""

import json
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from events import wait_until
from forked import start
from safetensors.torch import load_file
from toy import assert_equal
from trainees import SNAPSHOTS, Source, final_state, train


@pytest.fixture(scope="module")
def uninterrupted(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "state"
    process = start(train, str(folder), str(latents))
    process.join(120)
    assert process.exitcode == 0
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def wait_for(folder: Path, step: int, process: BaseProcess) -> None:
    wait_until(lambda: any(row["step"] >= step for row in rows(folder)), process)


def requested_ids(folder: Path) -> list[list[Any]]:
    return [json.loads(line) for line in folder.with_suffix(".ids").read_text().splitlines()]


def assert_same_run(folder: Path, uninterrupted: Path, latents: Path) -> None:
    assert_equal(final_state(folder), final_state(uninterrupted))
    for step in SNAPSHOTS:
        name = f"snapshot-{step:08d}.safetensors"
        assert_equal(load_file(folder / name), load_file(uninterrupted / name))
    loader = Source(latents).loader
    for index, ids in requested_ids(folder):
        assert ids == loader.ids(index).tolist()
    assert {index for index, _ in requested_ids(folder)} == set(range(30))


@pytest.mark.parametrize("seed", [0, 1])
def test_run_killed_at_random_steps_equals_the_uninterrupted_one(
    seed: int, latents: Path, tmp_path: Path, uninterrupted: Path
):
    chance, folder = random.Random(seed), tmp_path / "state"
    resumed_from = []
    for step in sorted(chance.sample(range(5, 29), 3)):
        process = start(train, str(folder), str(latents), 0.005)
        wait_for(folder, step, process)
        time.sleep(chance.uniform(0, 0.01))
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        reached = rows(folder)[-1]["step"]
        resumed_from.append(max(int(path.stem[5:]) for path in folder.glob("step-*.json")))
        assert reached - 8 < resumed_from[-1], "more was lost than an interval and the checkpoint under way"
    process = start(train, str(folder), str(latents))
    process.join(120)
    assert process.exitcode == 0
    assert_same_run(folder, uninterrupted, latents)
    reported = folder.with_suffix(".log").read_text()
    assert [f"resuming after iteration {step} " in reported for step in resumed_from] == [True] * 3
    assert [row["step"] for row in rows(folder)] == list(range(1, 31)), "no row lost or written twice"


def test_run_killed_within_the_write_of_a_checkpoint_equals_the_uninterrupted_one(
    latents: Path, tmp_path: Path, uninterrupted: Path
):
    folder = tmp_path / "state"
    process = start(train, str(folder), str(latents), 0.0, "SIGKILL")
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in sorted(folder.glob("step-*.json"))] == ["step-00000004.json", "step-00000008.json"]
    assert len(list(folder.glob(".*.tmp"))) == 1
    process = start(train, str(folder), str(latents))
    process.join(120)
    assert process.exitcode == 0
    assert_same_run(folder, uninterrupted, latents)
    assert list(folder.glob(".*.tmp")) == [], "what the killed process was writing is removed"


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138)])
def test_signal_saves_ends_with_its_status_and_resumes(
    name: str, status: int, latents: Path, tmp_path: Path, uninterrupted: Path
):
    folder, signum = tmp_path / "state", getattr(signal, name)
    process = start(train, str(folder), str(latents), 0.02)
    wait_for(folder, 6, process)
    assert process.pid is not None
    os.kill(process.pid, signum)
    process.join(60)
    assert process.exitcode == status
    saved = max(int(path.stem[5:]) for path in folder.glob("step-*.json"))
    assert saved == rows(folder)[-1]["step"], "nothing that was done is lost"
    process = start(train, str(folder), str(latents))
    process.join(120)
    assert process.exitcode == 0
    assert_same_run(folder, uninterrupted, latents)
    assert [index for index, _ in requested_ids(folder)] == list(range(30)), "no batch was requested twice"


def test_signal_within_the_write_of_a_checkpoint_waits_for_it(latents: Path, tmp_path: Path, uninterrupted: Path):
    folder = tmp_path / "state"
    process = start(train, str(folder), str(latents), 0.0, "SIGTERM")
    process.join(120)
    assert process.exitcode == 143
    process = start(train, str(folder), str(latents))
    process.join(120)
    assert process.exitcode == 0
    assert_same_run(folder, uninterrupted, latents)
    assert "falling back" not in folder.with_suffix(".log").read_text()
