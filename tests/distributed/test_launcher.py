"""The launcher: whose exit status it has, who hears a signal, and that nobody is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from events import wait_for_end, wait_until

from dmd2.training.launcher import Nodes, environment

ROOT = Path(__file__).parents[2]
LAUNCH = """
import sys
from dmd2.training.launcher import Nodes, Workers
sys.exit(Workers([sys.executable, "-c", sys.argv[1]], Nodes(1, 0, "127.0.0.1", 1), 2, float(sys.argv[2])).wait())
"""
WAIT = "import signal; open(f'ready-{rank}', 'w').close(); signal.pause()"
SAVES = """
import signal, sys, time
def save(*_):
    global heard
    heard += 1
heard = 0
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
open(f'ready-{rank}', 'w').close()
while not heard:
    time.sleep(0.01)
time.sleep(0.5)
open(f'saved-{rank}', 'w').write(str(heard))
sys.exit(143)
"""


def launch(code: str, folder: Path, grace_s: float = 30.0) -> subprocess.Popen[str]:
    """The launcher with two processes that run `code`, in which `rank` is known."""
    code = f"import os; rank = int(os.environ['RANK'])\n{code}"
    command = [sys.executable, "-c", LAUNCH, code, str(grace_s)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(folder: Path, *names: str) -> None:
    wait_until(lambda: all((folder / name).exists() for name in names))


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, reported = process.communicate(timeout=60)
    return process.returncode, reported


def test_processes_that_succeed_give_zero(tmp_path: Path):
    assert ended(launch("open(f'ready-{rank}', 'w')", tmp_path)) == (0, "")
    wait_for(tmp_path, "ready-0", "ready-1")


def test_status_is_that_of_the_first_that_failed_and_the_others_are_terminated(tmp_path: Path):
    code = f"import sys\nif rank == 1: sys.exit(7)\n{WAIT}"
    assert ended(launch(code, tmp_path)) == (7, "")


def test_killed_process_is_named_with_its_signal(tmp_path: Path):
    code = f"import signal\nif rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n{WAIT}"
    status, reported = ended(launch(code, tmp_path))
    assert status == 128 + signal.SIGKILL
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d error: rank 1 was ended by SIGKILL; the other ranks are terminated\n", reported
    )


def test_process_that_does_not_follow_a_failed_one_is_killed_after_the_grace(tmp_path: Path):
    code = f"""
import signal, sys, time
if rank == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    {WAIT}
while not os.path.exists('ready-0'): time.sleep(0.01)
sys.exit(2)
"""
    status, reported = ended(launch(code, tmp_path, grace_s=0.5))
    assert status == 2
    assert "error: rank 0 did not end within 0.5 s and is killed" in reported


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_reaches_every_process_once_and_waits_until_all_have_saved(name: str, tmp_path: Path):
    process = launch(SAVES, tmp_path)
    wait_for(tmp_path, "ready-0", "ready-1")
    os.killpg(process.pid, getattr(signal, name))  # as a terminal, Slurm or snakemake does: the whole group
    assert ended(process) == (143, "")
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in range(2)] == ["1", "1"]


def test_no_process_outlives_a_killed_launcher(tmp_path: Path):
    process = launch(f"open(f'pid-{{rank}}', 'w').write(str(os.getpid()))\n{WAIT}", tmp_path)
    wait_for(tmp_path, "ready-0", "ready-1")
    pids = [int((tmp_path / f"pid-{rank}").read_text()) for rank in range(2)]
    process.kill()
    process.wait()
    wait_for_end(*pids)


def test_one_machine_needs_no_settings():
    nodes = Nodes.of({})
    assert (nodes.num, nodes.this, nodes.address) == (1, 0, "127.0.0.1")
    assert nodes.port > 1023


SLURM = {"SLURM_NODEID": "1", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7", "SLURM_JOB_ID": "54321"}


def test_slurm_tells_the_rest_and_own_settings_win():
    assert Nodes.of({"DMD2_NODES": "3", **SLURM}) == Nodes(3, 1, "10.0.0.7", 34_321)
    own = {"DMD2_NODE": "2", "DMD2_MASTER_ADDR": "ib0", "DMD2_MASTER_PORT": "99"}
    assert Nodes.of({"DMD2_NODES": "3", **SLURM, **own}) == Nodes(3, 2, "ib0", 99)


def test_several_machines_that_know_nothing_of_each_other_are_refused():
    with pytest.raises(ValueError, match="DMD2_NODES is 2, which needs DMD2_NODE, DMD2_MASTER_ADDR, DMD2_MASTER_PORT"):
        Nodes.of({"DMD2_NODES": "2"})
    command = [sys.executable, "-m", "dmd2.training.launcher", "2", "train"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "DMD2_NODES": "2"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: DMD2_NODES is 2" in done.stderr


def test_ranks_go_on_from_machine_to_machine():
    nodes = Nodes(3, 2, "10.0.0.7", 1234)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    found = [environment(nodes, 4, local) for local in (0, 3)]
    assert [found[0][name] for name in names] == ["8", "12", "0", "4", "10.0.0.7", "1234"]
    assert [found[1][name] for name in names[:3]] == ["11", "12", "3"]


@pytest.mark.parametrize(
    ("gpus", "env", "wanted"),
    [
        ("0", {}, ["python -P -m dmd2.commands.preloaded train --spec {a b}"]),
        ("0", {"SLURM_JOB_ID": "5"}, ["python -P -m dmd2 train --spec {a b}"]),
        ("0", {"DMD2_NODES": "4", "DMD2_NODE": "2"}, ["python -P -m dmd2 train --spec {a b}"]),
        ("1", {}, ["python -P -m dmd2 train --spec {a b}"]),
        ("2", {}, ["python -P -m dmd2.training.launcher 2 train --spec {a b}"]),
        (
            "8",
            {"DMD2_NODES": "4", "SLURM_JOB_ID": "5"},
            [
                "srun --nodes=4 --ntasks=4 --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 "
                "python -P -m dmd2.training.launcher 8 train --spec {a b}"
            ],
        ),
        ("1", {"DMD2_NODES": "4", "DMD2_NODE": "2"}, ["python -P -m dmd2.training.launcher 1 train --spec {a b}"]),
    ],
)
def test_launch_script_starts_what_the_job_asks_for(gpus: str, env: dict[str, str], wanted: list[str], tmp_path: Path):
    for name in ("python", "srun"):
        stub = tmp_path / name
        stub.write_text('#!/bin/sh\necho "$(basename "$0")" "$@"\n')
        stub.chmod(0o755)
    command = [str(ROOT / "workflow/launch.sh"), gpus, "train", "--spec", "{a b}"]
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(command, env=path | env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == wanted
