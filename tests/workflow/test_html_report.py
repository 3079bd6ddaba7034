"""`snakemake --report` works without a network and holds what people look at."""

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from checkout import Checkout

CATEGORIES = ("Tables", "Training", "Samples", "Configuration")
RESULTS = ("table1.csv", "table3.csv", "curves.svg", "fid_curve.svg", "brightness.svg", "compare.png", "config.yaml")


def without_network() -> tuple[str, ...]:
    """A command prefix that cuts the network off, where the system lets us."""
    for prefix in (("unshare", "-n"), ("unshare", "-rn")):
        if shutil.which("unshare"):
            tried = subprocess.run([*prefix, "true"], capture_output=True, check=False)
            if tried.returncode == 0:
                return prefix
    pytest.skip("neither `unshare -n` nor `unshare -rn` is allowed here: the network cannot be cut off")


@pytest.fixture(scope="module", params=["report.html", "report.zip"])
def report(request: pytest.FixtureRequest, finished: Checkout) -> tuple[Path, str]:
    """The report's file, and what Snakemake said while writing it."""
    done = finished.snakemake_started_anew("--report", request.param, prefix=without_network())
    assert done.returncode == 0, done.stdout
    return finished / request.param, done.stdout


def content(path: Path) -> str:
    """Everything in the report as text."""
    if path.suffix == ".html":
        return path.read_text()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        texts = [archive.read(name).decode() for name in names if name.endswith((".html", ".js", ".csv", ".yaml"))]
    return "\n".join([*names, *texts])


def test_report_holds_tables_figures_sheets_and_configuration(report: tuple[Path, str]):
    text = content(report[0])
    for name in (*RESULTS, "grid.png", "real.png"):
        assert name in text, f"{name} is not in {report[0].name}"
    for category in CATEGORIES:
        assert category in text


def test_captions_came_through(report: tuple[Path, str]):
    text = content(report[0])
    assert "2405.14867" in text
    assert "turns a diffusion model of many steps into" in text.replace("\\n", " ")
    assert "{{ snakemake" not in text


def test_report_is_written_without_complaints(report: tuple[Path, str]):
    _, said = report
    assert "ERROR/" not in said
    assert "WARNING/" not in said
    assert "Missing" not in said
