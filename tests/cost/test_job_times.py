"""Where the time of a workflow went, from records as Snakemake writes them."""

import json
import sys
from pathlib import Path

import pytest

from dmd2.__main__ import main
from dmd2.cost.job_times import JobTime, read_jobs, report, running_seconds, text
from dmd2.errors import UserError


def write_record(folder: Path, output: str, rule: str, start: float, end: float | None, threads: int = 1) -> None:
    record = {
        "rule": rule,
        "log": [f"logs/{output}.log"],
        "shellcmd": f"launch.sh 0 --threads {threads} {rule}",
        "starttime": start,
        "endtime": end,
        "incomplete": end is None,
    }
    path = folder / ".snakemake/metadata" / output.replace("/", "_")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A teacher on two cores, then two trainings side by side of which one is longer, and a job that was cut."""
    write_record(tmp_path, "teacher", "teacher", 100, 110, threads=2)
    write_record(tmp_path, "dmd2", "train", 110, 130)
    write_record(tmp_path, "dmd", "train", 110, 140)
    write_record(tmp_path, "noreg", "train", 140, None)
    second = json.loads((tmp_path / ".snakemake/metadata/teacher").read_text()) | {"endtime": 109.9}
    (tmp_path / ".snakemake/metadata/teacher-log").write_text(json.dumps(second))  # the same job's second output
    return tmp_path


def test_jobs_count_once_and_idle_cores_are_counted(folder: Path):
    found = report(read_jobs(folder), cores=2)
    assert (found["wall_s"], found["busy_core_s"], found["idle_core_s"]) == (40, 70, 10)
    assert [(rule["rule"], rule["jobs"], rule["seconds"]) for rule in found["rules"]] == [
        ("train", 2, 50), ("teacher", 1, 10)
    ]  # fmt: skip
    assert "3 jobs, 40 s with at least one running on 2 core(s): 70 core seconds used, 10 idle (12%)" in text(found)


def test_pause_between_two_calls_is_nobodys_time():
    jobs = [JobTime("a", "", 0, 10, 1), JobTime("b", "", 5, 12, 1), JobTime("c", "", 1000, 1003, 1)]
    assert running_seconds(jobs) == 15


def test_command_prints_them(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    arguments = ["times", "--folder", str(folder), "--only", "logs/dmd", "--cores", "2"]
    monkeypatch.setattr(sys, "argv", ["dmd2", *arguments, "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    assert [job["name"] for job in json.loads(capsys.readouterr().out)["jobs"]] == ["logs/dmd.log", "logs/dmd2.log"]


def test_folder_without_records_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="no record of a finished job; run the workflow in this folder first"):
        read_jobs(tmp_path)
