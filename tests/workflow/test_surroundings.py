"""The workflow runs wherever it was unpacked, and whatever is in the folder where it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import Checkout, environment

SMALL = ("data/smoke/shards/manifest.json", "results/smoke/config.yaml", "results/table5.csv")
"""Targets of three rules that take seconds: one with a path from the preset, one with JSON, one with a file."""

NAMES = ("numbers", "statistics", "yaml", "typer", "numpy", "torch", "tqdm", "dmd2", "sitecustomize")
"""Modules of the standard library, of other packages, and our own."""


@pytest.fixture
def littered(fresh: Checkout, tmp_path: Path) -> Checkout:
    """A checkout, beside it a folder `work`, and in both a user's files with the names of modules."""
    checkout = fresh.copy(tmp_path / "dmd2")
    (tmp_path / "work").mkdir()
    for folder in (checkout.folder, tmp_path / "work"):
        for name in NAMES:
            if not (folder / name).exists():
                (folder / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the user was executed')\n")
    return checkout


@pytest.mark.parametrize("folder", ["dmd2", "work"])
def test_users_files_are_no_modules_for_the_workflow(littered: Checkout, tmp_path: Path, folder: str):
    where = ("-s", str(littered / "Snakefile"), "--cores", "1", "--directory", str(tmp_path / folder))
    env = {"PYTHONPATH": "", "PYTHONSAFEPATH": "1"}  # as the script `snakemake` starts Python
    done = littered.snakemake_started_anew(SMALL[0], *where, env=env)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / folder / SMALL[0]).stat().st_size


# The launcher starts its ranks as `launch.sh` starts one process of its own: `python -P -m dmd2`.
@pytest.mark.parametrize(("folder", "module"), [("dmd2", "preloaded"), ("dmd2", "launcher"), ("work", "preloaded")])
def test_users_files_are_no_modules_for_stages(littered: Checkout, tmp_path: Path, folder: str, module: str):
    env = {**environment(), "PYTHONPATH": f":{littered.folder}::.:{tmp_path / folder}"}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    processes = {"preloaded": "0", "launcher": "cpu:2"}[module]
    command = ["bash", str(littered / "workflow/launch.sh"), processes, "--log", "log", "cost"]
    done = subprocess.run(
        [*command, "--preset", "smoke"], cwd=tmp_path / folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "TFLOP an image" in done.stdout


def test_paths_with_blanks_and_quotes_run(fresh: Checkout, tmp_path: Path):
    checkout = fresh.copy(tmp_path / "it's my own dir; $HOME" / "dmd 2")
    (checkout / "workflow/launch.sh").chmod(0o644)  # the x bit does not survive every disk
    work = tmp_path / "an other dir"
    work.mkdir()
    where = ("-s", str(checkout / "Snakefile"), "--directory", str(work), "--cores", "1")
    done = checkout.snakemake_started_anew(*SMALL, *where, "--workflow-profile", str(checkout / "profiles/default"))
    assert done.returncode == 0, done.stdout
    assert all((work / path).stat().st_size for path in SMALL)
