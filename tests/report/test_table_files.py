"""The table files: every row of the paper in its order with its figures, and what each row requires."""

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml
from table_records import NUMBERS, PRESET, ROOT, load, record

from dmd2.errors import UserError
from dmd2.lineage.plan import Plan
from dmd2.report.columns import OF_CLASSES
from dmd2.report.tables import check_presets, load_table, measured_entries, rows, write_markdown
from dmd2.report.targets import fills


def paper_rows(number: int) -> dict[str, dict[str, Any]]:
    """The published figures, read from the list that the table files were checked against."""
    found: dict[str, dict[str, Any]] = {}
    with (ROOT / "tests/data/paper_tables.csv").open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if line["table"] == str(number):
                nfe = int(line["nfe"]) if line["nfe"] else None
                row = found.setdefault(line["row_id"], {"method": line["method"], "nfe": nfe, "paper": {}})
                if line["paper_value"]:
                    row["paper"][line["metric"]] = float(line["paper_value"])
    return found


@pytest.mark.parametrize("number", NUMBERS)
def test_every_row_of_the_paper_is_there_in_its_order_with_its_figures(number):
    found = {
        row.id: {"method": row.method, "nfe": row.nfe, "paper": row.paper} for row in load(number).rows_of("digits")
    }
    published = paper_rows(number)
    assert len(published) >= 4
    assert list(found)[: len(published)] == list(published)
    assert {key: found[key] for key in published} == published
    assert set(found) - set(published) <= {f"t{number}.floor"}


@pytest.mark.parametrize("preset", sorted(path.stem for path in (ROOT / "workflow" / "presets").glob("*.yaml")))
def test_every_entry_that_a_table_measures_exists_on_the_preset(preset):
    plan = Plan(ROOT / "workflow", preset)
    tables = [n for n in NUMBERS if fills(ROOT / "workflow", preset, f"table{n}", str(load(n).preset))]
    assert tables
    for number in tables:
        for entry in set(measured_entries(load(number), preset)) - {"floor"}:
            plan.metrics(entry)  # raises for an unknown run or sampler


def test_rows_beside_the_papers_claim_none_of_its_figures_but_those_of_released_weights():
    own = [row for n in NUMBERS for row in load(n).rows if row.only and row.paper]
    assert own
    for row in own:
        assert row.group in ("Released weights", "Best snapshot"), row.id
        assert row.paper.items() <= _paper_of(row.measure).items(), row.id


def _paper_of(measure):
    """The paper's figures of the run that a row's entry is a released copy or a snapshot of."""
    run = measure.partition("/")[0].removeprefix("released_")
    rows = [row for n in NUMBERS for row in load(n).rows if row.measure == f"{run}/student" and not row.only]
    return {name: value for row in rows for name, value in row.paper.items()}


def test_needed_lists_each_entry_once_in_order():
    assert measured_entries(load(1), "digits") == [
        "dmd/student", "dmd2/student", "dmd2_long/student", "teacher/ode", "teacher/sde", "floor"
    ]  # fmt: skip
    assert measured_entries(load(4), "sdxl") == [
        "dmd2_4step_no_gan/student", "dmd2_4step_no_dm/student", "dmd2_4step_no_backsim/student", "dmd2_4step/student",
        "released_dmd2_4step/student"
    ]  # fmt: skip


def test_ablation_ticks_are_the_papers():
    ticks = {row.id: set(row.ticks) for row in load(3).rows_of("digits")}
    assert ticks == {
        "t3.dmd": {"distribution_matching"},
        "t3.noreg": {"distribution_matching", "no_regression"},
        "t3.noreg_ttur": {"distribution_matching", "no_regression", "ttur"},
        "t3.full": {"distribution_matching", "no_regression", "ttur", "gan"},
        "t3.gan": {"gan"},
        "t3.gan_ttur": {"ttur", "gan"},
        "t3.floor": set(),
    }


@pytest.mark.parametrize("number", [1, 3])
def test_rows_of_the_same_model_measure_the_same_run(number):
    shared = {"t1.dmd": "t3.dmd", "t1.dmd2": "t3.full"}
    measured = {row.id: row.measure for table in (load(1), load(3)) for row in table.rows}
    assert all(measured[a] == measured[b] is not None for a, b in shared.items())


@pytest.mark.parametrize("preset", ["digits", "smoke", "cifar10"])
def test_rows_of_the_ablation_are_measured_after_equal_iterations(preset):
    plan, steps = Plan(ROOT / "workflow", preset), set()
    for row in load(3).rows_of(preset):
        if row.ticks and row.group != "Figure 9":
            run, _, sampler = row.entry(preset).partition("/")
            checkpoint = plan.preset.samplers[sampler].checkpoint
            steps.add(plan.run(run).train.iterations if checkpoint == "last" else checkpoint)
    assert len(steps) == 1, steps


def table_with(tmp_path: Path, *lines: str):
    """Table 1 with rows added at its end."""
    path = tmp_path / "table1.yaml"
    path.write_text((ROOT / "workflow/tables/table1.yaml").read_text() + "".join(f"  - {line}\n" for line in lines))
    return load_table(path)


OF_OTHERS = "{id: t1.big, group: New, method: Big, nfe: 1, measure: big/student, only: [imagenet64, cifar10]}"


def test_row_of_other_presets_is_neither_needed_nor_shown(tmp_path: Path):
    table = table_with(tmp_path, OF_OTHERS)
    assert "big/student" not in measured_entries(table, "digits")
    assert measured_entries(table, "imagenet64") == [*measured_entries(load(1), "imagenet64"), "big/student"]
    shown = {
        preset: [row["row_id"] for row in rows(table, {}, preset, PRESET.data)] for preset in ("digits", "cifar10")
    }
    assert shown["cifar10"][-1] == "t1.big"
    assert shown["digits"] == [row.id for row in table.rows if not row.only]
    write_markdown(table, rows(table, {}, "digits", PRESET.data), tmp_path / "table1.md")
    assert "Big |" not in (tmp_path / "table1.md").read_text()


def test_row_of_a_preset_that_does_not_exist_is_named(tmp_path: Path):
    table = table_with(tmp_path, OF_OTHERS)
    check_presets(table, ["digits", "imagenet64", "cifar10"], "table1.yaml")
    with pytest.raises(UserError, match=r"table1\.yaml: row t1\.dmd2_best: `only`: no preset 'cifar10'; known: digits"):
        check_presets(table, ["digits", "imagenet64"], "table1.yaml")
    with pytest.raises(UserError, match=r"table3\.yaml: row t3\.full: `instead`: no preset 'smoke'; known: cifar10"):
        check_presets(load(3), ["digits", "imagenet64", "cifar10"], "table3.yaml")


def test_row_is_filled_by_the_entry_that_stands_for_it_on_the_preset():
    def full(preset):
        records = {"dmd2/student": record(0.2), "dmd2/ablation": record(0.4, checkpoint_step=1500)}
        return next(row for row in rows(load(3), records, preset, PRESET.data) if row["row_id"] == "t3.full")

    assert (
        "dmd2/ablation" in measured_entries(load(3), "digits"),
        "dmd2/student" in measured_entries(load(3), "digits"),
    ) == (True, False)
    assert (full("digits")["fid"], full("digits")["checkpoint_step"]) == (0.4, 1500)
    assert (full("imagenet64")["fid"], full("imagenet64")["checkpoint_step"]) == (0.2, 2500)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["rows"][0].update(mesure="a/b"), r"unknown key `rows\.0\.mesure`; did you mean 'measure'"),
        (lambda t: t["rows"][0].update(measure="dmd2"), r"`rows\.0\.measure` is 'dmd2'"),
        (lambda t: t["rows"][0].update(measure="a/b", pending="later"), "`measure` or `pending`, not both"),
        (lambda t: t["rows"][0].update(instead={"smoke": "a/b"}), "`instead` needs `measure`"),
        (lambda t: t["rows"][0].update(paper={"fit": 1}), r"rows\.0\.paper\.fit"),
        (lambda t: t["rows"][0].update(id="t2.adm"), r"'t2\.adm' does not start with t1\."),
        (lambda t: t["rows"].append(t["rows"][0]), r"'t1\.biggan_deep' is listed twice"),
        (lambda t: t["rows"][0].update(ticks=["gan"]), r"ticks \['gan'\] are not among"),
        (lambda t: t.pop("title"), "missing key `title`"),
        (lambda t: t.update(measured=["fid", "patchfid"]), "no column 'patchfid'; did you mean 'patch_fid'"),
        (lambda t: t.update(measured=["clip"]), "`fid` is not listed"),
    ],
)
def test_mistake_in_a_table_file_is_named(tmp_path: Path, change, message):
    content = yaml.safe_load((ROOT / "workflow/tables/table1.yaml").read_text())
    change(content)
    path = tmp_path / "table1.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=rf"table1\.yaml: .*{message}"):
        load_table(path)


def test_captioned_tables_have_columns_of_their_own_and_those_of_classes_keep_theirs():
    measured = {number: load(number).measured for number in NUMBERS}
    assert measured[1] == measured[3] == OF_CLASSES
    for number in (2, 4, 5, 6):
        assert {"patch_fid", "alignment", "alignment_held_out", "prompt_diversity", "clip"} <= set(measured[number])
        assert "accuracy" not in measured[number]
    assert {"resolution", "latency_s"} <= set(measured[5])
    assert "lpips_diversity" in measured[6]
    for number in NUMBERS:
        assert len(set(load(number).columns())) == len(load(number).columns())


def test_values_of_prompts_reach_their_cells_and_the_resolution_is_the_datas(tmp_path: Path):
    content = record(1.5)
    content["metrics"] |= {"alignment": {"mean": 0.97, "sd": 0.004}, "latency_s": {"mean": 0.25, "sd": 0.01}}
    table = load(5)
    entry = next(row.measure for row in table.rows if row.measure)
    found = rows(table, {entry: content}, table.preset, PRESET.data)
    row = next(row for row in found if row["source"] == "measured")
    assert (row["alignment"], row["alignment_sd"], row["latency_s"], row["resolution"]) == (0.97, 0.004, 0.25, 8)
    write_markdown(table, found, tmp_path / "table5.md")
    lines = (tmp_path / "table5.md").read_text().splitlines()
    head = next(line for line in lines if "Method" in line)
    assert "| prompt accuracy |" in head
    assert "| latency (s) |" in head
    assert "held-out" not in head  # of which there is no value
    assert any("0.9700 ± 0.0040" in line for line in lines)
