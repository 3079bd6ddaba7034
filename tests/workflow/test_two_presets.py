"""Two presets in one call: each keeps its own jobs, and no table has figures of both."""

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import Checkout, jobs_in

OTHER = "extends: smoke\ndescription: The same stages under another name.\n"
SHARDS = "data/other/shards/manifest.json"


@pytest.fixture
def both(finished: Checkout) -> Iterator[Checkout]:
    """The finished run of smoke, with a second preset of which nothing was made; table 3 is its own."""
    with (
        finished.added("workflow/presets/other.yaml", OTHER),
        finished.edited("workflow/tables/table3.yaml", "preset: digits", "preset: other"),
        finished.edited("workflow/tables/table1.yaml", "preset: digits", "preset: smoke"),
        finished.edited("workflow/tables/table3.yaml", "smoke: dmd2/ablation", "other: dmd2/ablation"),
    ):
        yield finished


def planned(checkout: Checkout, *targets: str, overlay: dict | None = None) -> tuple[set[str], set[str]]:
    """The jobs of smoke and of the other preset, of a call that chooses no preset."""
    done = checkout.snakemake(*targets, "-n", overlay=overlay, config="mirror=")
    assert done.returncode == 0, done.stdout
    jobs = jobs_in(done.stdout)
    other = {job for job in jobs if job.startswith("other: ")}
    return jobs - other, {job.removeprefix("other: ") for job in other}


def test_one_call_makes_every_table_on_its_own_preset(both: Checkout):
    smoke, other = planned(both)
    assert {"shards", "teacher", "train noreg", "metrics dmd2/ablation", "curves", "compare"} <= other
    assert "train dmd2_long" not in other, "table 3 has no row of it"
    assert not {job for job in smoke if job.split()[0] in ("train", "sample", "metrics", "teacher")}
    assert {"table table1", "table table3"} <= smoke, "their files were edited"


def test_key_of_one_preset_plans_no_job_of_the_other(both: Checkout):
    before = planned(both)
    smoke, other = planned(both, overlay={"presets": {"other": {"train": {"seed": 5}}}})
    assert (smoke, other) == before, "nothing was made of the other preset, so all of it is planned as before"
    smoke, other = planned(both, overlay={"presets": {"smoke": {"runs": {"gan": {"seed": 5}}}}})
    assert other == before[1]
    smoke, other = planned(both, overlay={"train": {"seed": 5}})
    assert {"train dmd2", "train dmd"} <= smoke
    assert other == before[1], "keys without a name belong to the first table's preset"


def test_job_that_is_done_on_one_preset_stays_done_when_the_other_changes(both: Checkout, tmp_path: Path):
    checkout = both.copy(tmp_path / "dmd2")
    done = checkout.snakemake(SHARDS, "--cores", "1", config="mirror=")
    assert done.returncode == 0, done.stdout
    assert (checkout / "logs/other/shards.log").exists()
    targets = (SHARDS, "results/smoke/gan/student/metrics.json")
    assert planned(checkout, *targets) == (set(), set())
    change = {"data": {"shard_size": 100}}
    assert planned(checkout, *targets, overlay={"presets": {"other": change}}) == (set(), {"shards"})
    smoke, other = planned(checkout, *targets, overlay={"presets": {"smoke": change}})
    assert ("train gan" in smoke, other) == (True, set())


def test_table_of_another_preset_replaces_the_whole_table(finished: Checkout, tmp_path: Path):
    checkout = finished.copy(tmp_path / "dmd2")
    (checkout / "workflow/presets/other.yaml").write_text(OTHER)
    with checkout.edited("workflow/tables/table3.yaml", "smoke: dmd2/ablation", "other: dmd2/ablation"):
        done = checkout.snakemake("results/table3.csv", "--cores", "1", config="preset=other pending=true")
    assert done.returncode == 0, done.stdout
    with (checkout / "results/table3.csv").open(newline="") as file:
        assert {row["preset"] for row in csv.DictReader(file)} == {"other"}
