"""Launches and bytes of a step fall when biases and additions are folded, by what a count by hand finds."""

from __future__ import annotations

from pathlib import Path

from dmd2.cost.traffic import BIAS, CONV, SUM, traffic
from dmd2.lineage.plan import Plan

PLAN = Plan(Path(__file__).parents[2] / "workflow", "digits")


def test_folding_lowers_launches_and_bytes_of_the_whole_step():
    before, after = (traffic(PLAN.preset, PLAN.run("dmd2").train, 6, folded=folded) for folded in (False, True))
    assert after["total"].launches < before["total"].launches
    assert after["total"].gigabytes < before["total"].gigabytes
    assert after[CONV].launches == before[CONV].launches, "the convolutions are the same"
    assert after[BIAS].launches < 0.4 * before[BIAS].launches
    assert after[SUM].gigabytes < before[SUM].gigabytes
    parts = [count for kind, count in after.items() if kind != "total"]
    assert abs(sum(count.launches for count in parts) - after["total"].launches) < 1e-6
