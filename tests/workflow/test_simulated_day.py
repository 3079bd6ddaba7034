"""A short simulated day: Snakemake runs table 1's plan while attempts are pre-empted, lose a node, or are killed."""

from pathlib import Path

import pytest
import simulated_day
from checkout import Checkout


def test_nothing_trains_twice_and_nothing_is_lost(fresh: Checkout, tmp_path: Path):
    settings = simulated_day.Settings(
        gpus=8,
        presets=(("smoke", 4),),
        second_per_hour=0.12,
        kill_after_hours=1,
        factor=1000.0,
        targets=("results/table1.csv",),
        config="preset=smoke",
    )
    checkout = fresh.copy(tmp_path / "day")
    journal, killed = simulated_day.run(checkout, settings)
    found = simulated_day.attempts(journal, killed)
    simulated_day.check(journal, found)
    figures = simulated_day.report(settings, journal, found)
    assert (checkout / "results/table1.csv").exists()
    assert (figures["jobs"], figures["finished"], figures["trainings"]) == (22, 22, 5)
    assert figures["pre-empted"] >= 1
    assert figures["node died"] >= 1
    assert figures["killed with Snakemake"] >= 1

    again = next(line for line in journal if line["event"] == "finished" and line["stage"] == "train")
    twice = [*journal, again | {"event": "started", "attempt": 99}, again | {"attempt": 99}]
    with pytest.raises(AssertionError, match="finished 2 times"):
        simulated_day.check(twice, simulated_day.attempts(twice, killed))
