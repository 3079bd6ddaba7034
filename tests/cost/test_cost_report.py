"""What `dmd2 cost` and `dmd2 plan` tell, and when they refuse."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dmd2.__main__ import main
from dmd2.cost.flops import StepCost
from dmd2.cost.gpus import GPUS, UTILISATION, Gpu, gpu, known
from dmd2.cost.memory import Memory, State, Turn
from dmd2.cost.placement import FRAGMENTATION, RESERVED_GIB
from dmd2.errors import UserError
from dmd2.lineage.plan import Plan

ROOT = Path(__file__).parents[2]
SMALL = {"teacher": {"network": {"channel_mult": [1], "attn_resolutions": [], "channels_per_head": 16}}}
PLAN = ["plan", "table1", "table3", "--preset", "smoke"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit status and output of the command line, run here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dmd2", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
    return int(stop.value.code or 0), capsys.readouterr().out


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from dmd2.cost import report

    machines = report.Machines("a100-40gb", 2, "replicate")
    return report.tables(Plan(ROOT / "workflow", "smoke", SMALL), ["table1", "table3"], machines)


def test_cost_tells_the_parts_of_each_run(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    over = tmp_path / "small.yaml"
    over.write_text(json.dumps({"preset": "smoke", **SMALL}))
    runs = ["--run", "dmd2", "--run", "noreg"]
    status, text = run(capsys, "cost", "--preset", "smoke", "--configfile", str(over), *runs, "--json")
    found = json.loads(text)
    assert status == 0
    assert list(found["runs"]) == ["dmd2", "noreg"]
    for step in found["runs"].values():
        assert step["total"] == pytest.approx(sum(step["parts"].values()))
    assert "generator's GAN term" in found["runs"]["dmd2"]["parts"]
    assert "generator's GAN term" not in found["runs"]["noreg"]["parts"]


def test_plan_is_readable_and_has_every_measured_row(capsys: pytest.CaptureFixture[str], reported: dict[str, Any]):
    from dmd2.cost import text as cost_text

    text = cost_text.tables(reported)
    for row in reported["rows"]:
        assert row["row"] in text
    assert f"ASSUMED: {UTILISATION:.0%} of the peak" in text
    assert "noreg_ttur > dmd2_long" in text
    assert max(map(len, text.splitlines())) < 200


def test_shared_work_is_counted_once(reported: dict[str, Any]):
    rows, total = reported["rows"], reported["gpu_hours"]["total"]
    assert sum(row["added_gpu_hours"] for row in rows) == pytest.approx(total)
    assert sum(row["gpu_hours"] for row in rows) > 1.5 * total  # the teacher, and rows that stand in both tables
    by_row = {row["row"]: row for row in rows}
    assert by_row["t3.dmd"]["added_gpu_hours"] == 0
    assert by_row["t3.dmd"]["gpu_hours"] == by_row["t1.dmd"]["gpu_hours"]
    assert 0 < by_row["t3.full"]["added_gpu_hours"] < 0.5 * by_row["t3.full"]["gpu_hours"]  # a snapshot's samples
    assert by_row["t1.dmd2_long"]["chain"] == ["noreg_ttur", "dmd2_long"]
    assert sum(reported["gpu_hours"]["by_stage"].values()) == pytest.approx(total)


def test_every_trained_run_has_its_memory(reported: dict[str, Any]):
    assert reported["jobs"]["train"] == len(reported["memory"])
    for memory in reported["memory"].values():
        assert memory["fits"]
        assert memory["share"] == 16  # 32 on two GPUs
        assert memory["micro_batch"] * memory["parts"] == memory["share"]
        state = sum(memory[name] for name in ("generator", "critic", "teacher", "optimizers", "average"))
        assert memory["peak"] == state + max(memory["generator_turn"], memory["critic_turn"])


def test_a_rate_that_is_given_scales_the_hours(reported: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    from dmd2.cost import report

    rates = report.Machines("a100-40gb", 2, "replicate", tflops=100.0).rates()
    assert (rates.bf16, rates.fp32) == (100, 50)
    assumed = report.Machines("a100-40gb", 2, "replicate").rates()
    assert reported["machines"]["rates"] == {"bf16": assumed.bf16, "fp32": assumed.fp32}
    assert assumed.bf16 == UTILISATION * 312


def test_a_run_that_cannot_fit_ends_the_plan_with_an_error(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    from dmd2.cost import gpu_hours, report

    state = State(*[2**30] * 5, generator_gradients=2**30, critic_gradients=2**30, largest_unit=2**20)
    sample = Turn(((1, 3 * 2**30), (2, 4 * 2**30)))  # 5 GiB, and 2 + n for n samples
    memory = Memory(state, {"generator": sample, "critic": sample})
    monkeypatch.setattr(report, "measure_memory", lambda *_, **__: memory)
    monkeypatch.setattr(gpu_hours, "step_cost", lambda *_: StepCost({"critic": 1.0}))
    monkeypatch.setitem(GPUS, "small", Gpu("Small", 1.0, 0.5, memory_gib=RESERVED_GIB + 10 / (1 - FRAGMENTATION)))
    monkeypatch.setitem(GPUS, "tiny", Gpu("Tiny", 1.0, 0.5, memory_gib=RESERVED_GIB + 5))
    # A share of 32, two samples at a time: 9 of 10 GiB.
    status, text = run(capsys, *PLAN, "--gpu", "small", "--micro-batch", "3", "--json")
    assert status == 0
    assert {(m["largest_micro_batch"], m["parts"], m["peak"]) for m in json.loads(text)["memory"].values()} == {
        (2, 16, 9 * 2**30)
    }
    status, text = run(capsys, *PLAN, "--gpu", "small")
    assert status == 2
    assert "more memory than a small has; set runtime.micro_batch_size to at most 2" in caplog.text
    status, text = run(capsys, *PLAN, "--gpu", "tiny", "--json")
    assert status == 2
    assert not any(memory["fits"] for memory in json.loads(text)["memory"].values())
    assert "more memory than a tiny has; use --layout shard with several --gpus, or a larger --gpu" in caplog.text


def test_an_unknown_gpu_is_reported_with_the_known_ones():
    with pytest.raises(UserError, match=r"--gpu h100-80: .*did you mean 'h100-80gb'\?"):
        gpu("h100-80")


def test_gpus_are_known_by_the_name_that_torch_gives():
    with pytest.raises(UserError, match="did you mean 'h100-80gb'"):
        gpu("h100")
    assert known("NVIDIA H100 80GB HBM3") == GPUS["h100-80gb"]
    assert known("Some other device") is None
    assert all(found.tf32 < found.bf16 for found in GPUS.values())


def test_a_runs_own_key_wins_over_the_presets_default():
    plan = Plan(ROOT / "workflow", "digits")
    assert plan.run("dmd2").train.share_critic_pass
    assert not plan.run("dmd2_separate").train.share_critic_pass
    usual = plan.preset.train.model_copy(update={"share_critic_pass": False})
    assert plan.run("dmd2_separate").train == usual
