"""Which table is made on which preset, what it reads, and what is refused before any job."""

import shutil
from pathlib import Path

import pytest
import yaml

from dmd2.errors import UserError
from dmd2.report.tables import check_presets, load_table, measured_entries
from dmd2.report.targets import Targets

WORKFLOW = Path(__file__).parents[2] / "workflow"
CLASS_TABLES = ("table1", "table3")
TEXT_TABLES = ("table2", "table4", "table5", "table6")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The workflow's files, to be edited."""
    return Path(shutil.copytree(WORKFLOW, tmp_path / "workflow"))


def edit_table(folder: Path, name: str, **keys: object) -> None:
    path = folder / "tables" / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **keys}))


def test_every_table_is_made_on_its_own_preset(folder: Path):
    edit_table(folder, "table3", preset="smoke")
    targets = Targets(folder, {})
    assert {name: targets.preset_of(name) for name in targets.paper_tables} == {
        "table1": "digits", "table3": "smoke", **dict.fromkeys(TEXT_TABLES, "digits-t2i")
    }  # fmt: skip
    assert targets.in_use == ["digits", "digits-t2i", "smoke"]
    assert "teacher/ode" in targets.sampled("digits")
    assert "teacher/ode" not in targets.sampled("smoke"), "table 3 has no row of the teacher"
    assert "noreg/student" not in targets.sampled("digits")


@pytest.mark.parametrize("preset", ["smoke", "imagenet64", "cifar10"])
def test_chosen_preset_fills_every_table_that_presets_fill(preset: str):
    targets = Targets(WORKFLOW, {"preset": preset})
    assert targets.in_use == [preset]
    assert [name for name in targets.paper_tables if targets.preset_of(name) == preset] == list(CLASS_TABLES)
    assert targets.entries("table2") == []
    assert targets.table_spec("table1").name == preset


def test_keys_over_the_preset_belong_to_the_chosen_one_and_others_go_by_name(folder: Path):
    edit_table(folder, "table3", preset="smoke")
    keys = {"train": {"seed": 5}, "presets": {"smoke": {"train": {"seed": 6}}}}
    seeds = {name: Targets(folder, keys).plan(name).preset.train.seed for name in ("digits", "smoke", "cifar10")}
    assert (seeds["digits"], seeds["smoke"]) == (5, 6)
    assert seeds["cifar10"] == Targets(folder, {}).plan("cifar10").preset.train.seed
    chosen = Targets(folder, {"preset": "cifar10", "train": {"seed": 7}})
    assert (chosen.plan("cifar10").preset.train.seed, chosen.plan("digits").preset.train.seed) == (7, 10)


def test_side_by_side_sheet_takes_its_panels_from_the_tables(folder: Path):
    assert Targets(folder, {}).panels("digits") == {
        "teacher, ODE": "teacher/ode", "DMD2, one step": "dmd2/student", "no regression, 1:1": "noreg/student"
    }  # fmt: skip
    path = folder / "tables/table3.yaml"
    path.write_text(path.read_text().replace("measure: gan/student}", "measure: gan/student, panel: GAN alone}"))
    assert Targets(folder, {}).panels("digits")["GAN alone"] == "gan/student"


def test_preset_outside_the_tables_can_be_planned_whole(folder: Path):
    targets = Targets(folder, {})
    assert "cifar10" not in targets.in_use
    assert "dmd2/best" in targets.sampled("cifar10")
    assert "dmd2" in targets.students("cifar10")


def test_hidden_files_are_passed_over(folder: Path):
    expected = Targets(folder, {})
    for kind in ("presets", "runs", "tables"):
        (folder / kind / "._digits.yaml").write_bytes(b"\x00\x05\x16\x07")
    found = Targets(folder, {})
    assert (found.presets, found.runs, list(found.tables)) == (expected.presets, expected.runs, list(expected.tables))


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("presets", "reference", "presets/reference.yaml: reference is the name of another folder of results; rename"),
        ("runs", "teacher", "runs/teacher.yaml: teacher is the name of another folder of results; rename"),
        ("presets", "Digits", "Digits and digits would share a folder of results on some disks; rename one"),
        ("runs", "my run", "a name may only have letters, digits, - and _; rename the file"),
        ("runs", "a+b", "a name may only have letters, digits, - and _; rename the file"),
    ],
)
def test_name_without_a_folder_of_its_own_is_refused(folder: Path, kind: str, name: str, words: str):
    (folder / kind / f"{name}.yaml").write_text("extends: digits\n" if kind == "presets" else "extends: dmd2\n")
    refused(folder, {}, words)


@pytest.mark.parametrize(
    ("keys", "config", "words"),
    [
        (
            {"preset": "digts"},
            {},
            "table1.yaml: `preset`: no preset 'digts'; known: cifar10, digits, digits-t2i",
        ),
        ({"preset": None}, {}, "row t1.dmd is measured, but the table has no `preset` to measure it on"),
        ({}, {"preset": "digts"}, "digts.yaml: no such file; did you mean 'digits'?"),
        ({}, {"presets": {"digts": {}}}, "digts.yaml: no such file; did you mean 'digits'?"),
        ({}, {"presets": {"smoke": {"trian": {}}}}, "preset smoke: unknown key `trian`; did you mean 'train'?"),
    ],
)
def test_preset_that_does_not_exist_is_named(folder: Path, keys: dict, config: dict, words: str):
    edit_table(folder, "table1", **keys)
    refused(folder, config, words)


def test_sampler_that_a_row_names_and_a_preset_lacks_is_named(folder: Path):
    path = folder / "presets/digits.yaml"
    path.write_text(path.read_text().replace("  sde: {kind", "  sdee: {kind"))
    refused(folder, {}, "entry teacher/sde: no sampler 'sde' in preset digits; known: ode, sdee, student, ablation")


def refused(folder: Path, config: dict, words: str) -> None:
    with pytest.raises(UserError) as caught:
        Targets(folder, config)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_row_over_seeds_reads_an_entry_for_each_and_the_parent_has_the_seed_too():
    targets = Targets(WORKFLOW, {"preset": "smoke"})
    assert "deviations" not in targets.paper_tables
    assert targets.entries("deviations")[:2] == ["dmd2_seed10/ablation", "dmd2_seed11/ablation"]
    plan = targets.plan("smoke")
    assert plan.run("dmd2_seed11").train == plan.run("dmd2").train.model_copy(update={"seed": 11})
    assert plan.train("dmd2_seed10").digest == plan.train("dmd2").digest, "10 is the preset's seed"
    assert plan.train("dmd2_seed11").digest != plan.train("dmd2").digest
    assert plan.run("dmd2_long_seed11").train.init_run == "noreg_ttur_seed11"


def test_further_seeds_of_a_table_are_beside_the_runs_own_on_their_preset_alone():
    table = load_table(WORKFLOW / "tables/table2.yaml").model_copy(update={"seeds": {"smoke-t2i": (11, 12)}})
    found = measured_entries(table, "smoke-t2i")
    assert found[:3] == ["dmd2_1step/student", "dmd2_1step_seed11/student", "dmd2_1step_seed12/student"]
    assert [entry for entry in found if entry.startswith("teacher/")] == [
        *("teacher/low_guidance", "teacher/high_guidance", "teacher/ddim4")
    ]
    assert not any("_seed" in entry for entry in measured_entries(table, "digits-t2i"))
    with pytest.raises(UserError, match="here: `seeds`: no preset 'smoke-t2i'"):
        check_presets(table, ["digits-t2i", "sdxl"], "here")


def test_seed_of_an_imported_run_is_refused():
    with pytest.raises(UserError, match="released_dmd2 is imported, and a training seed changes nothing"):
        Targets(WORKFLOW, {"preset": "imagenet64"}).plan("imagenet64").run("released_dmd2_seed11")
