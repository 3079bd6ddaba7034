"""The step benchmark times the real step, and adds its rows to those that are there."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from counted import FLAT, real_run, timed_on_a_rank, train
from forked import on_ranks
from typer.testing import CliRunner

from dmd2.cost import bench, step_parts
from dmd2.cost.bench import Feed, Stopwatch
from dmd2.cost.bench_rows import COLUMNS, TIMES, append
from dmd2.cost.flops import step_cost
from dmd2.errors import UserError
from dmd2.lineage.plan import Plan
from dmd2.teachers import load_teacher

ROOT = Path(__file__).parents[2]
PLAN = Plan(ROOT / "workflow", "digits")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Two runs, one of them in parts, as rows of a file."""
    out = tmp_path_factory.mktemp("bench") / "new" / "step.csv"
    app = typer.Typer()
    app.command()(bench.main)
    arguments = ["--iterations", "3", "--batch-size", "8", "--device", "cpu", "--out", str(out)]
    for extra in (["--run", "dmd2", "--profile"], ["--run", "dmd", "--micro-batch", "4", "--activation-checkpointing"]):
        done = CliRunner().invoke(app, [*arguments, *extra])
        assert done.exit_code == 0, done.output
        assert "images/s" in done.output
        assert ("convolution_backward" in done.output) == ("--profile" in extra)
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_tell_what_ran_and_how_fast(rows: list[dict[str, str]]):
    assert [(row["run"], row["micro_batch"], row["iterations"]) for row in rows] == [
        ("dmd2", "8", "5"),
        ("dmd", "4", "3"),
    ]
    for row in rows:
        seconds = float(row["ms"]) / 1000
        assert float(row["images_per_s"]) == pytest.approx(8 / seconds, rel=0.01)
        flops = step_cost(PLAN.preset.teacher, PLAN.preset.data, PLAN.run(row["run"]).train).total
        assert float(row["tflops"]) == pytest.approx(flops * 8 / seconds / 1e12, rel=0.01)
        assert (row["device"], row["percent_of_peak"], row["peak_memory_gib"]) == ("cpu", "", "")
        assert (row["kernels"], row["torch"]) == ("reference", torch.__version__)
        assert 1 < float(row["ms"]) / float(row["ms_pass"]) / (8 / int(row["micro_batch"])) < 20


def test_a_profile_tells_how_long_the_device_computed(rows: list[dict[str, str]]):
    with_profile, without = (row["ms_busy"] for row in rows)
    assert without == ""
    assert float(with_profile) > 0


def test_every_part_of_the_step_has_its_time(rows: list[dict[str, str]]):
    with_gan, without = ({part for part, name in TIMES.items() if row[name]} for row in rows)
    assert with_gan == {*step_parts.PARTS, "rest"}
    assert without == with_gan - {step_parts.GAN}
    for row in rows:
        assert all(float(row[name]) >= 0 for name in TIMES.values() if row[name])
        rest = float(row[TIMES["rest"]]) / sum(float(row[name]) for name in TIMES.values() if row[name])
        assert rest < 0.3  # little of a step is outside of its parts


def test_several_ranks_time_a_sharded_run_together(tmp_path: Path):
    out = tmp_path / "step.csv"
    on_ranks(2, timed_on_a_rank, out)
    with out.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["ranks"], row["batch"], row["micro_batch"], row["layout"]) == ("2", "8", "4", "shard")
    assert float(row["images_per_s"]) == pytest.approx(8 / float(row["ms"]) * 1000, rel=0.01)


def test_rows_are_added_and_other_columns_refused(tmp_path: Path):
    path = tmp_path / "step.csv"
    append(path, [{"run": "a"}])
    append(path, [{"run": "b"}, {"run": "c"}])
    with path.open(newline="") as file:
        assert [row["run"] for row in csv.DictReader(file)] == ["a", "b", "c"]
    path.write_text(path.read_text().replace(COLUMNS[0], "other", 1))
    with pytest.raises(UserError, match="other columns"):
        append(path, [{"run": "d"}])


class Ticks:
    """A clock that goes on by one at each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1
        return self.now


def test_a_part_inside_another_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "time", Ticks())
    run, watch = real_run(FLAT, train()), Stopwatch(torch.device("cpu"))
    with step_parts.observed(run, watch):
        run.step(0)
    # One tick for each time a part was the outermost; `Tensor.backward` calls `torch.autograd.backward` inside.
    assert watch.seconds() == {
        step_parts.GENERATOR: 1,
        step_parts.REAL: 1,
        step_parts.FAKE: 1,
        step_parts.GAN: 2,  # the critic's pass, and the gradient at the images
        step_parts.GENERATOR_BACKWARD: 1,
        step_parts.CRITIC: 1,
        step_parts.CRITIC_BACKWARD: 1,
        step_parts.OPTIMIZERS: 2,
        step_parts.AVERAGE: 1,
    }


def test_watching_a_step_leaves_nothing_behind_and_changes_nothing():
    plain, watched = real_run(FLAT, train()), real_run(FLAT, train())
    before = (torch.Tensor.backward, torch.autograd.grad, torch.autograd.backward)
    expected = plain.step(0)
    with step_parts.observed(watched, Stopwatch(torch.device("cpu"))):
        found = watched.step(0)
    assert before == (torch.Tensor.backward, torch.autograd.grad, torch.autograd.backward)
    assert not watched.critic._forward_hooks
    assert "denoise_and_tap" not in vars(watched.teacher.denoiser)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.fixture
def feed(tmp_path: Path) -> Iterator[Feed]:
    feed = Feed(tmp_path, PLAN, load_teacher(PLAN.preset.teacher, PLAN.preset.data), batch_size=16)
    yield feed
    feed.close()


def test_the_feed_is_a_stream_of_images_in_the_networks_range(feed: Feed):
    batches: list[Any] = [feed.data(index) for index in range(5)]
    for x0, cond in batches:
        assert x0.shape == (16, 1, 8, 8)
        assert -1 <= x0.min() < x0.max() <= 1
        assert set(cond) == {"label"}
    assert not any(torch.equal(x0, batches[0][0]) for x0, _ in batches[1:])
    assert math.isclose(float(torch.stack([x0 for x0, _ in batches]).mean()), 0, abs_tol=0.05)
