"""What a user's shell, folder or terminal has left over does not reach a stage."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import pytest

from dmd2.report.figures import STYLE, curves_figure
from dmd2.training import launcher
from dmd2.training.loop import StopSignals

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "workflow" / "launch.sh"
PRINT_ENVIRONMENT = "#!{python} -S\nimport json, os, sys\nprint(json.dumps([dict(os.environ), sys.argv[1:]]))\n"


def launched(folder: Path, *arguments: str, bash: bool = False, **environment: str) -> tuple[dict[str, str], list[str]]:
    """The environment and arguments that `launch.sh` gives to Python."""
    stub = folder / "bin" / "python"
    stub.parent.mkdir(exist_ok=True)
    stub.write_text(PRINT_ENVIRONMENT.format(python=sys.executable))
    stub.chmod(0o755)
    command = [*(["bash"] if bash else []), str(SCRIPT), *arguments]
    env = {"PATH": f"{stub.parent}:/usr/bin:/bin", "DMD2_DEV": str(folder), **environment}
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=True)
    found, given = json.loads(done.stdout)
    return found, given


def test_rank_variables_of_the_shell_reach_no_stage(tmp_path: Path):
    left_over = {**dict.fromkeys(launcher.RANK_VARIABLES, "1"), launcher.LAUNCHER: "1", "TORCHELASTIC_RUN_ID": "x"}
    found, _ = launched(tmp_path, "0", "shards", **left_over)
    assert not left_over.keys() & found.keys()


def test_a_notebooks_backend_and_a_lost_temporary_folder_are_replaced(tmp_path: Path):
    backend = "module://matplotlib_inline.backend_inline"
    found, _ = launched(tmp_path, "0", "curves", MPLBACKEND=backend, TMPDIR=str(tmp_path / "gone"))
    assert (found["MPLBACKEND"], found["TMPDIR"]) == ("agg", "/tmp")


def test_devices_with_slashes_in_their_names_are_taken(tmp_path: Path):
    """The names of MIG devices before driver 470: MIG-GPU-UUID/1/0."""
    name = f"MIG-GPU-{os.getpid()}/1/0"
    found, _ = launched(tmp_path, "1", "train", CUDA_VISIBLE_DEVICES=name, TMPDIR=str(tmp_path))
    assert found["CUDA_VISIBLE_DEVICES"] == name


def test_the_working_folder_is_no_place_for_modules(tmp_path: Path):
    (tmp_path / "numbers.py").write_text("raise SystemExit('the folder of the user was searched for modules')")
    done = subprocess.run(
        ["bash", str(SCRIPT), "0", "downloads", "--help"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "DMD2_PRELOAD": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_start_the_launcher_by_its_quoted_path():
    """Neither its x bit, nor the search path, nor a blank in a folder's name matters."""
    for path in (ROOT / "workflow/rules").glob("*.smk"):
        for line in path.read_text().splitlines():
            assert "launch.sh" not in line or "DMD2_LAUNCH=" in line or line.lstrip().startswith("#"), f"{path}: {line}"
    assert "eol=lf" in (ROOT / ".gitattributes").read_text()


def test_no_shell_of_a_rule_outlives_the_start_of_its_stage():
    """It would end at SIGTERM before the stage has saved."""
    started = [
        line.strip()
        for path in (ROOT / "workflow/rules").glob("*.smk")
        for line in path.read_text().replace("\\", "").splitlines()
        if '"$DMD2_LAUNCH"' in line
    ]
    assert len(started) > 20
    for line in started:
        assert line[1:].removeprefix("DMD2_NODES={resources.nodes} ").startswith('exec bash "$DMD2_LAUNCH"'), line


def test_a_users_matplotlib_settings_do_not_change_figures(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "matching_loss": 1.0}\n{"step": 2, "matching_loss": 2.0}\n')
    curves_figure({"dmd2": log}, tmp_path / "plain.svg")
    with mpl.rc_context({"font.size": 31, "axes.facecolor": "red", "svg.fonttype": "path"}):
        curves_figure({"dmd2": log}, tmp_path / "users.svg")
        assert mpl.rcParams["font.size"] == 31, "the user's own figures keep their settings"
    assert (tmp_path / "plain.svg").read_bytes() == (tmp_path / "users.svg").read_bytes()
    assert STYLE["font.size"] == 8


@pytest.mark.parametrize(("ignored", "received"), [(False, signal.SIGHUP), (True, None)])
def test_a_closed_terminal_is_a_stop_unless_nohup_ignores_it(ignored: bool, received: int | None):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received == received
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)
