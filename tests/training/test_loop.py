"""The loop around a step: when it saves, exports, logs, resumes and stops."""

import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from toy import DIGEST

from dmd2.config import Runtime
from dmd2.errors import Interrupted
from dmd2.files import read_json, write_json
from dmd2.training.checkpoint_format import seal
from dmd2.training.checkpoint_store import CheckpointStore
from dmd2.training.loop import StopSignals, fit
from dmd2.training.optimizer import FiniteGuard


class Counting:
    """A trainee whose weight is the sum of the indices it was requested."""

    def __init__(self) -> None:
        self.guard = FiniteGuard(torch.device("cpu"))
        self.total = torch.zeros((), dtype=torch.float64)
        self.requested: list[int] = []
        self.signals: dict[int, int] = {}

    def step(self, index: int) -> dict[str, Tensor]:
        self.requested.append(index)
        self.total = self.total + index
        if index in self.signals:
            os.kill(os.getpid(), self.signals[index])
        return {"denoising_loss": torch.tensor(float(index))}

    def export(self) -> dict[str, Tensor]:
        return {"total": self.total}

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total = state["total"]


def run(folder: Path, trainee: Counting, iterations: int = 10, **options: Any) -> dict[str, float]:
    keys = {"log_every": 3, "checkpoint_every": 4, **options.pop("runtime", {})}
    with CheckpointStore(folder, DIGEST, keep=100) as store:
        return fit(trainee, iterations, store, Runtime(**keys), title="count", **options)


def steps(folder: Path) -> list[int]:
    return sorted(int(path.stem[5:]) for path in folder.glob("step-*.json"))


def test_saves_at_intervals_and_at_the_end(tmp_path: Path):
    run(tmp_path, Counting())
    assert steps(tmp_path) == [4, 8, 10]


def test_saves_by_the_clock_where_that_comes_first(tmp_path: Path):
    run(tmp_path, Counting(), runtime={"checkpoint_minutes": 1e-9})
    assert steps(tmp_path) == list(range(1, 11))


def test_resumed_fit_asks_for_the_remaining_iterations_alone(tmp_path: Path):
    first = Counting()
    run(tmp_path, first, iterations=6)
    second = Counting()
    took = run(tmp_path, second, iterations=10)
    assert (first.requested, second.requested) == (list(range(6)), [6, 7, 8, 9])
    assert float(second.total) == sum(range(10))
    earlier = read_json(tmp_path / "step-00000006.json")
    assert took["wall_s"] >= earlier["wall_s"]
    assert took["cpu_s"] >= earlier["cpu_s"]


def test_finished_fit_does_nothing_more(tmp_path: Path):
    run(tmp_path, Counting())
    again = Counting()
    run(tmp_path, again)
    assert again.requested == []
    assert float(again.total) == 45


def test_time_of_earlier_attempts_counts(tmp_path: Path):
    run(tmp_path, Counting(), iterations=4)
    path = tmp_path / "step-00000004.json"
    write_json(path, seal({**read_json(path), "wall_s": 1000.0}))
    assert run(tmp_path, Counting())["wall_s"] >= 1000


def test_snapshots_hold_the_export_of_their_step(tmp_path: Path):
    run(tmp_path, Counting(), snapshots=[3, 10])
    assert sorted(path.name for path in tmp_path.glob("snapshot-*")) == [
        "snapshot-00000003.safetensors",
        "snapshot-00000010.safetensors",
    ]
    for step in (3, 10):
        assert float(load_file(tmp_path / f"snapshot-{step:08d}.safetensors")["total"]) == sum(range(step))


def test_alarm_sees_every_row_and_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    seen = []

    def alarm(row: dict[str, float]) -> str | None:
        seen.append(row["step"])
        return "too high" if row["denoising_loss"] > 7 else None

    with caplog.at_level(logging.INFO, "dmd2"):
        run(tmp_path, Counting(), alarm=alarm)
    assert seen == [3, 4, 6, 8, 9, 10]
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["count: iteration 9: too high", "count: iteration 10: too high"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signal_ends_after_the_step_with_a_checkpoint_and_its_status(name: str, tmp_path: Path):
    trainee, signum = Counting(), getattr(signal, name)
    handler = signal.getsignal(signum)
    trainee.signals = {4: signum}
    with pytest.raises(Interrupted, match=f"{name}: saved after iteration 5; run the same command") as stop:
        run(tmp_path, trainee)
    assert stop.value.status == 128 + signum
    assert steps(tmp_path) == [4, 5]
    assert signal.getsignal(signum) is handler, "the handlers are put back"
    again = Counting()
    run(tmp_path, again)
    assert float(again.total) == 45


def test_signal_on_the_last_iteration_still_ends_and_the_next_run_finishes(tmp_path: Path):
    trainee = Counting()
    trainee.signals = {9: signal.SIGTERM}
    with pytest.raises(Interrupted):
        run(tmp_path, trainee, snapshots=[10])
    again = Counting()
    run(tmp_path, again, snapshots=[10])
    assert again.requested == []
    assert (tmp_path / "snapshot-00000010.safetensors").exists()


def test_second_ctrl_c_does_not_wait():
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_after_a_request_to_stop_waits_once_more():
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
