"""The page of results, made of the committed tables."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from dmd2.errors import UserError
from dmd2.report import page
from dmd2.report.sheets import grid_png

ROOT = Path(__file__).parents[2]
VOID = {"meta", "link", "img", "br"}


class Structure(HTMLParser):
    """Tags that are closed in order, and every address that a browser would load or follow."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.followed: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.open += [tag] * (tag not in VOID)
        self.loaded += [given["src"]] if "src" in given else []
        self.followed += [given["href"]] if "href" in given else []
        self.anchors |= {f"#{given['id']}"} if "id" in given else set()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "results"
    shutil.copytree(ROOT / "results/reference", folder, ignore=shutil.ignore_patterns("*.png"))
    (folder / "digits/figures").mkdir(parents=True)
    shutil.copy(ROOT / "docs/compare.png", folder / "digits/figures")
    labels = np.arange(20) % 10
    for entry in ("dmd2/student", "gan/student"):
        grid_png(np.zeros((20, 8, 8, 1), np.uint8), labels, folder / "digits" / entry / "grid.png")
    logs = {
        "dmd2": '{"step": 5, "d_accuracy": 0.5}\n{"step": 9, "neighbour_ratio": 0.6}\n',
        "gan": '{"step": 5, "neighbour_ratio": 0.01, "num_nonfinite": 0.0}\n',
    }
    for run, log in logs.items():
        (folder / "digits" / run / "train_log.jsonl").write_text(log)
    return folder


@pytest.fixture(scope="module")
def text(results: Path) -> str:
    sums = {"jobs": 3, "wall_s": 9.0, "gpu_hours": 2.5, "cpu_hours": 5.0, "energy_kwh": None}
    row = {"preset": "digits", "stage": "train", "model": "<dmd2>", **sums}
    usage = {"cores": 2, "gpus": 8, "idle_core_share": 0.25, "idle_gpu_share": 0.125}
    costs = {"total": sums, "by_stage": [row], "by_model": [row], **usage}
    return page.write(results, ROOT / "workflow", costs).read_text()


def row_of(text: str, method: str) -> list[str]:
    """The first row of a table whose first cell ends with `method`."""
    for row in re.findall(r"<tr[^>]*>.*?</tr>", text, re.DOTALL):
        cells = [re.sub(r"<span.*?</span>", "", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)]
        if cells and re.sub("<.*?>", "", cells[0]) == method:
            return cells
    raise AssertionError(f"no row {method}")


def test_papers_figures_stand_beside_ours_and_quoted_rows_last(text: str):
    assert row_of(text, "DMD2 + longer training")[:3] == ["DMD2 + longer training", "1.28", "0.439 ± 0.027"]
    assert row_of(text, "BigGAN-deep")[:3] == ["BigGAN-deep", "4.06", ""]
    assert text.index("Real images, resampled") < text.index("BigGAN-deep")


def test_page_is_whole_and_loads_nothing(text: str):
    found = Structure()
    found.feed(text)
    assert found.open == []
    assert all(address.startswith("data:image/") for address in found.loaded)
    assert len(found.loaded) == 3  # side by side, and two sheets
    assert {link for link in found.followed if link.startswith("#")} <= found.anchors
    assert {link for link in found.followed if not link.startswith("#")} == {"https://arxiv.org/abs/2405.14867"}
    assert "<script" not in text
    assert "url(" not in text


def test_collapse_is_marked_and_costs_are_shown(text: str):
    assert row_of(text, "gan")[1] == "0.01 !"
    assert row_of(text, "dmd2")[1:3] == ["0.6", "0.5"]
    assert "12% of 8 GPUs were idle" in text
    assert row_of(text, "digits")[1:] == ["train", "3", "2.5", "5", "not known"]
    assert "&lt;dmd2&gt;" in text


def test_folder_without_tables_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="no table"):
        page.write(tmp_path, ROOT / "workflow", None)
