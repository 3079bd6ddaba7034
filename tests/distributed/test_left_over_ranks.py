"""Rank variables that another job left in the shell reach no stage; only the launcher sets them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dmd2.__main__ import main
from dmd2.training import launcher

ROOT = Path(__file__).parents[2]
LEFT_OVER = {
    **dict.fromkeys(launcher.RANK_VARIABLES, "1"),
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29511",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    launcher.LAUNCHER: "1",
}
CHILD = "import json, os; from dmd2.training import launcher; print(json.dumps(dict(os.environ)))"
DROPS = CHILD.replace("; print", "; launcher.drop_foreign_ranks(); print")


def ranks_in(env: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name in LEFT_OVER}


def test_stage_that_no_launcher_started_has_none():
    env = {**os.environ, **LEFT_OVER, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", DROPS], env=env, capture_output=True, text=True, check=True)
    assert ranks_in(json.loads(done.stdout)) == {}


def test_rank_has_those_of_its_launcher_alone(tmp_path: Path):
    code = f"{DROPS[: DROPS.index('print')]}open('rank-' + os.environ['RANK'], 'w').write(json.dumps(dict(os.environ)))"
    start = (
        "import sys; from dmd2.training.launcher import Nodes, Workers; "
        f"sys.exit(Workers([sys.executable, '-c', {code!r}], Nodes(1, 0, '127.0.0.1', 7), 2).wait())"
    )
    env = {**os.environ, **LEFT_OVER, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", start], env=env, cwd=tmp_path, check=True)
    for rank in range(2):
        found = ranks_in(json.loads((tmp_path / f"rank-{rank}").read_text()))
        found.pop(launcher.LAUNCHER)
        assert found == {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "7",
        }  # fmt: skip


def test_command_line_drops_them(monkeypatch: pytest.MonkeyPatch):
    for name, value in LEFT_OVER.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["dmd2", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert ranks_in(dict(os.environ)) == {}
