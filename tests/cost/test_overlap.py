"""What a backward pass hides of the exchange of gradients, by the model and from a dry run."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmd2.cost.overlap import Departure, Exchange, exchanges
from dmd2.lineage.plan import Plan

PLAN = Plan(Path(__file__).parents[2] / "workflow", "digits")


def test_exposed_is_what_is_left_after_the_backward_pass():
    each = Exchange("x", 1e12, [Departure(10**9, 0.25), Departure(2 * 10**9, 0.5), Departure(10**9, 1.0)])
    backward, exchange, exposed = each.seconds(tflops=1.0, gb_per_s=8.0)
    assert (backward, exchange) == (1.0, 0.5)
    assert exposed == pytest.approx(0.125), "the last bucket; the others were through at 0.375 and 0.75"


def test_small_buckets_leave_while_backward_runs_and_one_large_one_at_its_end():
    train = PLAN.run("dmd2").train
    small, large = (exchanges(PLAN.preset, train, 6, bucket_bytes=size) for size in (2**15, 2**30))
    for few, many in zip(large, small, strict=True):
        assert many.num_bytes == few.num_bytes > 10**5
        assert [each.done for each in few.departures] == [1.0]
        assert [each.done for each in many.departures] == sorted(each.done for each in many.departures)
        early = sum(each.num_bytes for each in many.departures if each.done < 0.9)
        assert early > 0.7 * many.num_bytes
