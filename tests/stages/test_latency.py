"""The time of one image, its parts and its passes, from a run's weights to the cells of table 5."""

import json
from pathlib import Path
from typing import Any

import pytest
from text_results import OVER
from world import RUNTIME, WORKFLOW, World

from dmd2.errors import UserError
from dmd2.lineage.plan import Plan
from dmd2.report.tables import rows, with_latency
from dmd2.report.targets import Targets
from dmd2.stages.latency import latency

LATENCY = {"warm_up": 1, "repeats": 3}
FEW = {"samplers": {"low_guidance": {"num_steps": 2}}}


def plan(**evaluation: Any) -> Plan:
    return Plan(WORKFLOW, "smoke-t2i", {**OVER, **FEW, "evaluation": evaluation})


@pytest.mark.parametrize(
    ("entry", "file", "passes"),
    [
        ("dmd2_4step/student", "dmd2_4step/generator", 4),
        ("teacher/low_guidance", "teacher/teacher", 4),  # two steps, guided
        ("teacher/pndm", "teacher/teacher", 10),  # four steps in five passes, guided
    ],
)
def test_the_parts_of_an_image_are_timed_and_its_passes_counted(
    text_results: Path, tmp_path: Path, entry: str, file: str, passes: int
):
    spec, out = plan(latency={**LATENCY, "precision": "bf16"}).latency(entry), tmp_path / "latency.json"
    components = text_results / "components/components.json"
    latency(spec, text_results / f"{file}.safetensors", out, RUNTIME, components)
    found = json.loads(out.read_text())
    assert found["passes"] == found["nfe"] == passes
    assert (found["precision"], found["provenance"]["digest"]) == ("bf16", spec.digest)
    assert found["device"].startswith("CPU (")
    assert list(found["seconds"]) == ["text", "network", "decoder", "total"]
    calls = [found["seconds"][part]["calls"] for part in ("text", "network", "decoder", "total")]
    assert all(min(part) > 0 and len(part) == 3 for part in calls)
    assert calls[3] == pytest.approx([sum(parts) for parts in zip(*calls[:3], strict=True)])


def test_a_model_of_classes_is_timed_too(world: World, tmp_path: Path):
    spec = world.plan(evaluation={"latency": LATENCY}).latency("dmd2/student")
    latency(spec, world.student, tmp_path / "latency.json", RUNTIME)
    assert json.loads((tmp_path / "latency.json").read_text())["passes"] == 1


def test_it_changes_no_digest_but_the_tables():
    before, after, entry = plan(), plan(latency=LATENCY), "teacher/pndm"
    assert before.metrics(entry).digest == after.metrics(entry).digest
    assert before.sample(entry).digest == after.sample(entry).digest
    assert before.table([entry]).digest == after.table([entry]).digest
    assert set(after.table([entry], [entry]).upstream) == {entry, f"latency {entry}"}
    off = Targets(WORKFLOW, {"preset": "smoke-t2i"})
    on = Targets(WORKFLOW, {"preset": "smoke-t2i", "evaluation": {"latency": {}}})
    assert off.timed("table5") == on.timed("table2") == []
    assert on.timed("table5") == [entry for entry in on.entries("table5") if entry != "floor"]


def test_cells_have_the_median_and_how_it_was_measured():
    table, measured = Targets(WORKFLOW, {}).tables["table5"], plan()
    times = {"median": 0.25, "sd": 0.01}
    timed = {"seconds": dict.fromkeys(("text", "network", "decoder"), times) | {"total": {"median": 0.7, "sd": 0.02}}}
    timed |= {"device": "NVIDIA A100", "precision": "bf16", "warm_up": 3, "repeats": 20}
    record: dict[str, Any] = {
        "metrics": {"fid": {"mean": 1.0, "sd": 0.1}},
        "nfe": 8,
        "num_samples": 4,
        "num_blocks": 2,
        "seed": 0,
        "protocols": {"edm": {}},
        "features": {"name": "classifier", "sha256": "ab" * 32, "reference": "data"},
        "model": {"run": "teacher"},
        "provenance": {"digest": "0", "commit": "0"},
    }
    records = {"teacher/dpmpp4": with_latency(record, timed, "here"), "teacher/unipc4": record}
    found = {row["row_id"]: row for row in rows(table, records, "smoke-t2i", measured.preset.data)}
    row = found["t5.dpmpp4"]
    assert (row["latency_s"], row["latency_s_sd"], row["latency_network_s"]) == (0.7, 0.02, 0.25)
    assert row["latency_protocol"] == "NVIDIA A100, bf16, batch 1, median ± deviation of 20 images after 3"
    assert found["t5.unipc4"]["latency_s"] is None
    with pytest.raises(UserError, match="here: missing key `device`"):
        with_latency(record, {key: value for key, value in timed.items() if key != "device"}, "here")
