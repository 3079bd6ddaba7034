"""The training log: means over intervals, and what a cut-off attempt leaves behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dmd2.training.log import TrainLog

CLOCK = {"wall_s": 1.0, "cpu_s": 0.5}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_row_is_the_mean_of_its_interval_by_how_often_a_term_occurred(tmp_path: Path):
    with TrainLog(tmp_path, 0) as log:
        for value in (1.0, 2.0, 6.0):
            log.add({"every": torch.tensor(value), **({"seldom": torch.tensor(5.0)} if value == 2 else {})})
        first = log.flush(3, CLOCK)
        log.add({"every": torch.tensor(10.0)})
        log.flush(4, CLOCK)
        assert log.flush(4, CLOCK) == {}, "nothing new, no row"
    assert first == {"step": 3, **CLOCK, "every": 3.0, "seldom": 5.0}
    assert rows(tmp_path) == [first, {"step": 4, **CLOCK, "every": 10.0}]


def test_rows_beyond_the_start_and_a_cut_off_row_are_dropped(tmp_path: Path):
    lines = [json.dumps({"step": step, "loss": 0.0}) for step in (2, 4, 6)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 7, "lo')
    with TrainLog(tmp_path, 4) as log:
        log.add({"loss": torch.tensor(1.0)})
        log.flush(5, CLOCK)
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 5]


def test_row_cut_off_before_the_start_is_dropped(tmp_path: Path):
    (tmp_path / "log.jsonl").write_text('{"step": 2}\n{"ste')
    with TrainLog(tmp_path, 10):
        pass
    assert [row["step"] for row in rows(tmp_path)] == [2]


def test_value_that_is_not_finite_is_left_out_of_its_row(tmp_path: Path):
    with TrainLog(tmp_path, 0) as log:
        log.add({"good": torch.tensor(1.0), "bad": torch.tensor(float("nan")), "large": torch.tensor(float("inf"))})
        log.flush(1, CLOCK)
    assert rows(tmp_path) == [{"step": 1, **CLOCK, "good": 1.0}]


def test_critic_lag_is_the_rise_of_the_loss_after_an_update(tmp_path: Path):
    with TrainLog(tmp_path, 0) as log:
        log.add({"denoising_loss_after_update": torch.tensor(1.2), "denoising_loss_before_update": torch.tensor(1.0)})
        row = log.flush(1, CLOCK)
    assert row["critic_lag"] == pytest.approx(0.2)


def test_other_ranks_get_rows_and_write_none(tmp_path: Path):
    with TrainLog(tmp_path, 0, enabled=False) as log:
        log.add({"loss": torch.tensor(2.0)})
        assert log.flush(1, CLOCK)["loss"] == 2.0
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_holds_the_same_figures(tmp_path: Path):
    for start in (0, 2):  # the second attempt begins again after step 2
        with TrainLog(tmp_path, start) as log:
            for step in range(start + 1, start + 4):
                log.add({"loss": torch.tensor(float(10 * start + step))})
                log.flush(step, CLOCK)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = {event.step: event.value for event in events.Scalars("loss")}
    assert shown == {row["step"]: row["loss"] for row in rows(tmp_path)}
