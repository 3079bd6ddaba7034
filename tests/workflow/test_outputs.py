"""What a finished run leaves: tables with every row of the paper, records, figures and sheets."""

import csv
import json
import re
import subprocess
from xml.etree import ElementTree

import pytest
from checkout import REPOSITORY, Checkout
from PIL import Image

MEASURED = {
    "t1.dmd": "dmd",
    "t1.dmd2": "dmd2",
    "t1.dmd2_long": "dmd2_long",
    "t1.edm_ode": "teacher",
    "t1.edm_sde": "teacher",
    "t1.floor": "data",
    "t3.dmd": "dmd",
    "t3.noreg": "noreg",
    "t3.noreg_ttur": "noreg_ttur",
    "t3.full": "dmd2",
    "t3.gan": "gan",
    "t3.gan_ttur": "gan_ttur",
    "t3.floor": "data",
}
NOT_OF_THE_PAPER = {"t1.floor", "t3.floor"}
NUM_RUNS, NUM_CLASSES, ROWS_OF_A_SHEET = 7, 10, 8
SIDE = 40  # pixels that an image of a sheet has at least, to be seen


def table(checkout: Checkout, number: int) -> list[dict[str, str]]:
    with (checkout / f"results/table{number}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def paper(number: int) -> dict[str, dict[str, float]]:
    """The paper's figures by row and metric, in the paper's order."""
    figures: dict[str, dict[str, float]] = {}
    with (REPOSITORY / "tests/data/paper_tables.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            if line["table"] == str(number) and line["paper_value"]:
                figures.setdefault(line["row_id"], {})[line["metric"]] = float(line["paper_value"])
    return figures


@pytest.mark.parametrize("number", [1, 3])
def test_table_has_every_row_and_figure_of_the_paper_in_order(finished: Checkout, number: int):
    metrics = ("resolution", "latency_s", "fid", "patch_fid", "clip", "diversity")
    quoted = {}
    for row in table(finished, number):
        if row["row_id"] not in NOT_OF_THE_PAPER:
            values = {metric: row.get(f"paper_{metric}") for metric in metrics}
            quoted[row["row_id"]] = {metric: float(value) for metric, value in values.items() if value}
    assert list(quoted.items()) == list(paper(number).items())


@pytest.mark.parametrize("number", [1, 3])
def test_only_the_rows_of_this_project_are_measured(finished: Checkout, number: int):
    for row in table(finished, number):
        if row["row_id"] in MEASURED:
            assert row["source"] == "measured"
        else:
            assert row["source"] in ("quoted", "pending")
            assert row["fid"] == row["commit"] == row["run"] == ""


@pytest.mark.parametrize("number", [1, 3])
def test_measured_row_says_how_it_came_about(finished: Checkout, number: int):
    git = ["git", "-C", str(finished.folder), "rev-parse", "--short=12", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    rows = [row for row in table(finished, number) if row["row_id"] in MEASURED]
    assert rows
    for row in rows:
        assert float(row["fid"]) > 0
        assert float(row["fid_sd"]) > 0
        assert float(row["pixel_fd"]) > 0
        assert (row["num_samples"], row["num_blocks"]) == ("300", "2")
        assert row["commit"] == head
        assert re.fullmatch("[0-9a-f]{16}", row["config_digest"])
        assert re.fullmatch("classifier [0-9a-f]{12}", row["features"])
        assert (row["preset"], row["dataset"]) == ("smoke", "digits 8x8")
        assert row["run"] == MEASURED[row["row_id"]]
        if row["run"] != "data":
            assert 0 <= float(row["accuracy"]) <= 1
            assert row["nfe"] == ("11" if row["run"] == "teacher" else "1")
            assert float(row["train_cpu_s"]) > 0


def test_ablation_rows_state_their_training(finished: Checkout):
    """Rows of table 3 have the same iterations; one update in five moves the generator, or each of them."""
    rows = {row["row_id"]: row for row in table(finished, 3) if row["run"] != "data"}
    assert {name: row["generator_updates"] for name, row in rows.items()} == {
        **dict.fromkeys(("t3.noreg_ttur", "t3.full", "t3.gan_ttur"), "2"),
        **dict.fromkeys(("t3.dmd", "t3.noreg", "t3.gan"), "10"),
    }
    assert {(row["iterations"], row["checkpoint_step"]) for row in rows.values()} == {("10", "10")}
    assert {name for name, row in rows.items() if row["selection"] == "snapshot"} == {"t3.full"}


def test_snapshot_in_the_ablation_took_less_than_the_whole_run(finished: Checkout):
    part = next(row for row in table(finished, 3) if row["row_id"] == "t3.full")
    whole = next(row for row in table(finished, 1) if row["row_id"] == "t1.dmd2")
    assert (whole["checkpoint_step"], whole["generator_updates"], whole["selection"]) == ("20", "4", "last")
    assert 0 < float(part["train_cpu_s"]) < float(whole["train_cpu_s"])
    assert part["fid"] != whole["fid"]


@pytest.mark.parametrize("number", [1, 3])
def test_markdown_has_the_rows_of_the_csv(finished: Checkout, number: int):
    text = (finished / f"results/table{number}.md").read_text()
    assert text.startswith(f"# Table {number}: ")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = table(finished, number)
    assert len(lines) == len(rows) + 1  # the heading
    assert all(f"| {row['method']} |" in line for row, line in zip(rows, lines[1:], strict=True))


def test_records_and_metrics_name_commit_digest_and_versions(finished: Checkout):
    for path in ["teacher/teacher.json", "dmd2/generator.json", "dmd2/student/metrics.json", "floor/metrics.json"]:
        made = json.loads((finished / f"results/smoke/{path}").read_text())["provenance"]
        assert re.fullmatch("[0-9a-f]{16}", made["digest"])
        assert re.fullmatch("[0-9a-f]{12}", made["commit"])
        assert made["versions"]["torch"]
        assert made["spec"]["data"]["source"] == "digits"


def test_every_entry_has_a_sheet_of_all_classes(finished: Checkout):
    sheets = sorted((finished / "results/smoke").glob("*/*/grid.png"))
    assert len(sheets) == NUM_RUNS + 3  # the teacher's two samplers, and a snapshot of dmd2
    for path in [*sheets, finished / "results/smoke/figures/real.png"]:
        with Image.open(path) as image:
            image.load()
            assert image.width >= NUM_CLASSES * SIDE
            assert image.height >= ROWS_OF_A_SHEET * SIDE
            assert len(image.convert("L").getcolors(256)) > 5, f"{path} is blank"


def test_side_by_side_sheet_has_four_panels(finished: Checkout):
    with Image.open(finished / "results/smoke/figures/compare.png") as image:
        assert image.width >= 4 * NUM_CLASSES * SIDE
        assert image.height >= ROWS_OF_A_SHEET * SIDE


@pytest.mark.parametrize("name", ["curves", "brightness", "fid_curve"])
def test_figure_is_drawn_with_every_run(finished: Checkout, name: str):
    root = ElementTree.parse(finished / f"results/smoke/figures/{name}.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    width, height = (float(root.get(side, "0pt").removesuffix("pt")) for side in ("width", "height"))
    assert 200 < width < 3000
    assert 100 < height < 3000
    text = ElementTree.tostring(root, encoding="unicode")
    missing = [run for run in {"dmd", "dmd2", "noreg", "noreg_ttur"} if not re.search(rf"\b{run}\b", text)]
    assert missing == []


def test_curve_has_a_row_per_snapshot(finished: Checkout):
    with (finished / "results/smoke/dmd2/curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["generator_updates"]) for row in rows] == [("10", "2"), ("20", "4")]
    assert all(float(row["fid"]) > 0 for row in rows)


def test_long_stages_tell_progress_and_time_left(finished: Checkout):
    for name in ("features", "teacher", "train/dmd2", "sample/dmd2-student", "metrics/dmd2-student"):
        log = (finished / f"logs/smoke/{name}.log").read_text()
        assert re.search(r"100%.*\[\d\d:\d\d<00:00", log), log


def test_nothing_is_left_of_the_checkpoints(finished: Checkout):
    assert list((finished / "state").glob("*/step-*")) == []
