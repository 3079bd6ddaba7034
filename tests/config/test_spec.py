"""The specification of a job: its canonical string, absent sections, and what its sections compute."""

from pathlib import Path

import pytest

from dmd2.config import Preset, Sampler, Train
from dmd2.config.reading import parse
from dmd2.errors import UserError
from dmd2.lineage.plan import Plan
from dmd2.lineage.spec import Spec, read_spec

WORKFLOW = Path(__file__).parents[2] / "workflow"


def test_spec_comes_back_from_its_canonical_string_and_file(tmp_path: Path):
    for spec in (Plan(WORKFLOW, "smoke").train("dmd2_long"), Plan(WORKFLOW, "smoke").sample("teacher/sde")):
        assert read_spec(spec.to_json()).to_json() == spec.to_json()
        assert read_spec(spec.to_json()).digest == spec.digest
        (tmp_path / "spec.json").write_text(spec.to_json())
        assert read_spec(f"@{tmp_path / 'spec.json'}").to_json() == spec.to_json()


@pytest.mark.parametrize("text", ["{", "[1]", "words"])
def test_spec_that_is_no_mapping_is_an_error_in_one_line(text: str):
    with pytest.raises(UserError, match="--spec: ") as error:
        read_spec(text)
    assert "\n" not in str(error.value)


def test_stage_that_reads_a_section_its_spec_lacks_is_a_bug():
    spec = Spec.of("metrics", "x")
    with pytest.raises(ValueError, match="stage metrics reads `train`"):
        spec.need("train")


def test_snapshots_are_even_and_end_with_the_run():
    assert Train(iterations=10, num_snapshots=3).snapshot_steps() == [3, 6, 10]
    assert Train(iterations=7, num_snapshots=7).snapshot_steps() == list(range(1, 8))


def test_models_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Train().seed = 1  # type: ignore[misc]


def test_parse_names_a_missing_key():
    with pytest.raises(UserError, match="here: missing key `kind`"):
        parse(Sampler, {}, "here")
    with pytest.raises(UserError, match=r"missing key `data\.source`"):
        parse(Preset, {"name": "x", "data": {}}, "here")
