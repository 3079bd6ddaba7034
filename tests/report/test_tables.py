"""Tables made of metric records: measured figures only where something was measured, in CSV and Markdown."""

import csv
from pathlib import Path
from typing import Any

import pytest
from table_records import NUMBERS, PRESET, ROOT, load, record

from dmd2.config.reading import load_preset
from dmd2.errors import UserError
from dmd2.files import write_json
from dmd2.report.tables import load_table, measured_entries, read_records, rounded, rows, write_csv, write_markdown


def test_without_records_rows_are_pending_or_quoted_and_nothing_is_measured():
    for number in NUMBERS:
        table = load(number)
        for row, spec in zip(
            rows(table, dict.fromkeys(measured_entries(table, PRESET.name)), PRESET.name, PRESET.data),
            table.rows_of(PRESET.name),
            strict=True,
        ):
            assert row["source"] == ("pending" if spec.entry(PRESET.name) or spec.pending else "quoted")
            assert row["fid"] is None
            assert row["source"] == "quoted" or row["note"]


def test_a_record_fills_its_row_and_no_other():
    table = load(1)
    found = {
        row["row_id"]: row for row in rows(table, {"dmd2/student": record(0.0513, seed=10)}, PRESET.name, PRESET.data)
    }
    row = found.pop("t1.dmd2")
    assert (row["paper_fid"], row["fid"], row["fid_sd"], row["nfe"], row["paper_nfe"]) == (1.51, 0.0513, 0.0061, 1, 1)
    assert (row["source"], row["preset"], row["dataset"]) == ("measured", "digits", "digits 8x8")
    assert (row["run"], row["iterations"], row["generator_updates"]) == ("dmd2", 2500, 500)
    assert (row["seeds"], row["num_samples"], row["num_blocks"]) == ("training 10; samples 0", 5391, 3)
    assert (row["config_digest"], row["commit"]) == ("0123456789abcdef", "feedbeef")
    assert row["protocol"] == "edm (rounding: round, covariance start: zeros)"
    assert row["reference"] == "data"
    assert row["features"] == "classifier abababababab"
    assert {other["source"] for other in found.values()} == {"quoted", "pending"}
    assert all(other["fid"] is None for other in found.values())


def test_quoted_rows_stay_quoted_whatever_records_there_are():
    table = load(1)
    records = {entry: record(0.01) for entry in [*measured_entries(table, PRESET.name), "t1.adm", "ADM/student"]}
    found = {row["row_id"]: row for row in rows(table, records, PRESET.name, PRESET.data)}
    assert found["t1.adm"]["source"] == "quoted"
    assert found["t1.adm"]["fid"] is None
    assert found["t1.edm_ode"]["source"] == "measured"


def test_floor_needs_no_model_and_has_no_paper_figure():
    floor = {key: value for key, value in record(0.03).items() if key not in ("nfe", "model")}
    row = rows(load(3), {"floor": floor}, PRESET.name, PRESET.data)[-1]
    assert (row["row_id"], row["source"], row["fid"], row["paper_fid"]) == ("t3.floor", "measured", 0.03, None)
    assert row["run"] is None
    assert row["gan"] is None


def test_csv_reads_back_with_full_precision_and_all_rows(tmp_path: Path):
    table = load(3)
    written = rows(table, {"gan/student": record(1 / 3)}, PRESET.name, PRESET.data)
    write_csv(written, tmp_path / "table3.csv")
    with (tmp_path / "table3.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == table.columns()
    assert [row["row_id"] for row in found] == [row.id for row in table.rows_of("digits")]
    assert float(found[4]["fid"]) == 1 / 3
    assert (found[4]["gan"], found[4]["ttur"]) == ("yes", "no")
    assert (found[0]["fid"], found[0]["paper_fid"], found[0]["source"]) == ("", "2.62", "pending")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda r: r.pop("metrics"), "missing key `metrics`"),
        (lambda r: r["metrics"].pop("fid"), r"missing key `metrics\.fid`"),
        (lambda r: r["metrics"]["fid"].update(mean="low"), r"`metrics\.fid\.mean` is 'low'"),
        (lambda r: r["metrics"]["fid"].update(mean=float("nan")), r"`metrics\.fid\.mean` is nan"),
        (lambda r: r["provenance"].pop("commit"), r"missing key `provenance\.commit`"),
        (lambda r: r["features"].update(sha256=None), r"`features\.sha256` is None"),
    ],
)
def test_malformed_record_is_named_with_its_key(tmp_path: Path, break_it, message):
    content = record(0.05)
    break_it(content)
    path = tmp_path / "dmd2.json"
    with pytest.raises(UserError, match=rf"dmd2\.json: {message}"):
        rows(load(1), {"dmd2/student": content}, PRESET.name, PRESET.data, {"dmd2/student": path})
    with pytest.raises(UserError, match=rf"metrics of dmd2/student: {message}"):
        rows(load(1), {"dmd2/student": content}, PRESET.name, PRESET.data)


def test_missing_file_is_a_missing_record_and_a_damaged_one_an_error(tmp_path: Path):
    write_json(tmp_path / "a.json", record(0.1))
    found = read_records({"a/student": tmp_path / "a.json", "b/student": tmp_path / "b.json"})
    assert found == {"a/student": record(0.1), "b/student": None}
    (tmp_path / "b.json").write_text('{"metrics": ')
    with pytest.raises(UserError, match=r"b\.json: damaged JSON"):
        read_records({"b/student": tmp_path / "b.json"})


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_markdown_shows_both_figures_and_says_whose_data_they_are_of(tmp_path: Path):
    table = load(1)
    write_markdown(
        table, rows(table, {"dmd2/student": record(0.05134)}, PRESET.name, PRESET.data), tmp_path / "table1.md"
    )
    text = (tmp_path / "table1.md").read_text()
    head = cells_of(next(line for line in text.splitlines() if "Method" in line))
    row = dict(zip(head, cells_of(next(line for line in text.splitlines() if "| DMD2 |" in line)), strict=True))
    assert row["FID (paper)"] == "1.51"
    assert row["FID"] == "0.0513 ± 0.0061"
    assert row["source"] == "measured"
    assert "on **digits 8x8** (preset `digits`)" in text
    assert "not the paper's" in text
    assert "3 x 5,391 samples" in text
    pending = dict(zip(head, cells_of(next(line for line in text.splitlines() if "teacher ODE" in line)), strict=True))
    assert (pending["FID (paper)"], pending["FID"], pending["source"]) == ("2.32", "pending", "pending")
    quoted = dict(zip(head, cells_of(next(line for line in text.splitlines() if "StyleGAN-XL" in line)), strict=True))
    assert (quoted["FID"], quoted["source"]) == ("", "quoted")
    assert "- pending: not measured here yet: no metrics of dmd/student; " in text


def test_markdown_of_the_ablation_states_ticks_and_compute(tmp_path: Path):
    table = load(3)
    found = rows(table, {"noreg_ttur/student": record(0.08, train_cpu_s=1234.5)}, PRESET.name, PRESET.data)
    write_markdown(table, found, tmp_path / "table3.md")
    lines = (tmp_path / "table3.md").read_text().splitlines()
    head = cells_of(next(line for line in lines if "Method" in line))
    row = dict(zip(head, cells_of(next(line for line in lines if "no regression, TTUR |" in line)), strict=True))
    assert [row[name] for name in ("distribution matching", "no regression", "TTUR", "GAN")] == ["✓", "✓", "✓", ""]
    assert (row["iterations"], row["generator updates"], row["training CPU-s"]) == ("2,500", "500", "1,234")


def of_two_protocols() -> dict[str, Any]:
    found = record(1.6, selection="best", checkpoint_step=2250)
    found["metrics"] |= {
        "fid_dmd2": {"mean": 1.51, "sd": 0.02, "blocks": [1.51]},
        "inception_score": {"mean": 48.25, "sd": 0.5, "blocks": [48.25]},
        "precision": {"mean": 0.74, "sd": 0.01, "blocks": [0.74]},
        "recall": {"mean": 0.63, "sd": 0.01, "blocks": [0.63]},
    }
    found["protocols"]["dmd2"] = {"rounding": "truncate", "covariance_start": "ones"}
    found["features"]["reference"] = "imagenet-64x64.npz 0123456789ab"
    return found


def test_protocols_stand_side_by_side_and_the_row_says_which_checkpoint_and_reference(tmp_path: Path):
    table = load(1)
    found = rows(table, {"dmd2/student": of_two_protocols()}, PRESET.name, PRESET.data)
    row = next(row for row in found if row["row_id"] == "t1.dmd2")
    assert (row["fid"], row["fid_dmd2"], row["fid_dmd2_sd"], row["fid_edm"]) == (1.6, 1.51, 0.02, None)
    assert (row["checkpoint_step"], row["selection"]) == (2250, "best")
    assert (row["inception_score"], row["precision"], row["recall"]) == (48.25, 0.74, 0.63)
    assert row["reference"] == "imagenet-64x64.npz 0123456789ab"
    assert row["protocol"].endswith("; dmd2 (rounding: truncate, covariance start: ones)")
    write_markdown(table, found, tmp_path / "table1.md")
    lines = (tmp_path / "table1.md").read_text().splitlines()
    head = cells_of(next(line for line in lines if "Method" in line))
    shown = dict(zip(head, cells_of(next(line for line in lines if "| DMD2 |" in line)), strict=True))
    assert shown["FID, protocol dmd2"] == "1.510 ± 0.020"
    assert (shown["precision"], shown["recall"], shown["inception score"]) == ("0.740", "0.630", "48.25 ± 0.50")
    assert shown["checkpoint"] == "best"
    assert "FID, protocol edm" not in head
    caption = next(line for line in lines if "5,391 samples" in line)
    assert "moments of imagenet-64x64.npz 0123456789ab, protocol edm (rounding: round" in caption


def test_caption_states_the_floors_settings_only_where_it_stands_alone(tmp_path: Path):
    table, floor = load(1), {key: value for key, value in record(0.03).items() if key not in ("nfe", "model")}
    floor["model"] = {"run": "data"}
    for records, times in (({"floor": floor}, 1), ({"floor": floor, "dmd2/student": of_two_protocols()}, 1)):
        write_markdown(table, rows(table, records, PRESET.name, PRESET.data), tmp_path / "t.md")
        assert (tmp_path / "t.md").read_text().count("5,391 samples") == times
    assert "moments of the data" not in (tmp_path / "t.md").read_text()


def test_measures_that_no_row_has_get_no_column_for_reading(tmp_path: Path):
    table = load(1)
    write_markdown(table, rows(table, {"dmd2/student": record(0.05)}, "digits", PRESET.data), tmp_path / "t.md")
    text = (tmp_path / "t.md").read_text()
    assert "| FID |" in text
    for title in ("protocol dmd2", "precision", "recall", "inception score", "checkpoint"):
        assert f"{title} |" not in text


def test_markdown_of_a_table_nothing_is_measured_for_has_the_papers_columns_alone(tmp_path: Path):
    table = load(5)
    write_markdown(table, rows(table, {}, None, None), tmp_path / "table5.md")
    text = (tmp_path / "table5.md").read_text()
    assert "pixel FD" not in text
    assert "| DMD2 | 512 | 0.09 | 8.35 | pending |" in text
    assert "the selected preset has other tables" in text


def test_markdown_on_the_papers_data_does_not_call_the_figures_foreign(tmp_path: Path):
    data = load_preset(ROOT / "workflow", "imagenet64").data
    table = load(1)
    write_markdown(table, rows(table, {}, "imagenet64", data), tmp_path / "table1.md")
    text = (tmp_path / "table1.md").read_text()
    assert "**imagenet_tar 64x64** (preset `imagenet64`)" in text
    assert "figures of other data" not in text


@pytest.mark.parametrize(
    ("mean", "sd", "text"),
    [
        (0.05134, 0.0061, "0.0513 ± 0.0061"),
        (64.71, 3.2, "64.7 ± 3.2"),
        (64.71, 32.0, "65 ± 32"),
        (0.98, None, "0.980"),
        (2.2701, None, "2.27"),
        (152.4, None, "152"),
        (0.5, 0.0, "0.500"),
    ],
)
def test_numbers_are_rounded_to_what_their_spread_supports(mean, sd, text):
    assert rounded(mean, sd) == text


def seeded(seed: int, fid: float, pixel_fd: float) -> dict:
    content = record(fid, seed=seed)
    content["metrics"]["pixel_fd"] = {"mean": pixel_fd, "sd": 0.001}
    return content


def test_row_over_seeds_has_their_mean_and_deviation(tmp_path: Path):
    table = load_table(ROOT / "workflow/tables/deviations.yaml")
    entries = ("hinge_seed10/student", "hinge_seed11/student")
    found = dict(zip(entries, (seeded(10, 0.4, 0.2), seeded(11, 0.6, 0.4)), strict=True))
    filled = {row["row_id"]: row for row in rows(table, found, "digits", PRESET.data)}
    assert filled["gan_loss"]["fid"] == pytest.approx(0.5)
    assert filled["gan_loss"]["fid_sd"] == pytest.approx(0.2 / 2**0.5)
    assert filled["gan_loss"]["pixel_fd_sd"] == pytest.approx(0.2 / 2**0.5)
    assert filled["gan_loss"]["training_seeds"] == 2
    assert filled["gan_loss"]["seeds"].startswith("training 10, 11; ")
    assert filled["r1_weight"]["source"] == "pending"
    assert filled["r1_weight"]["note"] == "no metrics of r1_seed10/student, r1_seed11/student"
    write_markdown(table, list(filled.values()), tmp_path / "t.md")
    text = (tmp_path / "t.md").read_text()
    assert text.startswith("# Deviations of other implementations")
    assert "| measured, 2 seeds |" in text
    assert "(paper)" not in text


def test_one_seed_of_two_leaves_the_row_pending():
    table = load_table(ROOT / "workflow/tables/deviations.yaml")
    found = {"hinge_seed10/student": seeded(10, 0.4, 0.2)}
    (row,) = (row for row in rows(table, found, "digits", PRESET.data) if row["row_id"] == "gan_loss")
    assert (row["source"], row["fid"], row["note"]) == ("pending", None, "no metrics of hinge_seed11/student")


def test_row_of_one_seed_is_marked(tmp_path: Path):
    table = load(1)
    filled = rows(table, {"dmd2/student": record(0.05, seed=10)}, PRESET.name, PRESET.data)
    write_markdown(table, filled, tmp_path / "t.md")
    text = (tmp_path / "t.md").read_text()
    assert "| measured, 1 seed |" in text
    assert "of one training seed: a small difference between two such rows may be chance" in text
