"""Collected only where another test imported triton before this folder could ask for its interpreter."""

import os
import subprocess
import sys
from pathlib import Path


def test_the_triton_tests_pass_in_a_process_of_their_own() -> None:
    files = map(str, sorted(Path(__file__).parent.glob("test_triton_*.py")))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "mode: interpreter\n" in done.stdout
