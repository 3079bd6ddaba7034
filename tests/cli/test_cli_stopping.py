"""A training that is asked to stop, beside a second one that wants its folder."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from command import dmd2, environment, train_options
from safetensors.torch import load_file


def test_killed_training_refuses_a_second_one_and_resumes_to_the_same_weights(folder: Path, told: list[str]):
    start = folder / "noreg_ttur/networks.safetensors"
    arguments = train_options(folder, "dmd2_long", "long", "killed", start=start)
    command = [sys.executable, "-m", "dmd2", "--threads", "1", *arguments]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 200
    while not any(log.read_text().count("\n") >= 8 for log in (folder / "killed").glob("dmd2_long-*/log.jsonl")):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)  # it waits, in the middle of its run
    assert dmd2(*arguments) == 2
    assert f"in use by process {process.pid} on " in told[0]
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    _, text = process.communicate(timeout=100)
    assert process.returncode == 143
    assert "error: SIGTERM: saved after iteration" in text
    assert "Traceback" not in text
    assert not (folder / "long").exists(), "nothing is published of a run that is not finished"
    assert dmd2(*arguments) == 0
    assert dmd2(*train_options(folder, "dmd2_long", "straight", "uninterrupted", start=start)) == 0
    for name in ("generator", "networks"):
        resumed, straight = (load_file(folder / out / f"{name}.safetensors") for out in ("long", "straight"))
        assert resumed.keys() == straight.keys()
        assert all(torch.equal(resumed[key], straight[key]) for key in resumed)
