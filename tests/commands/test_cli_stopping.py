"""A training that is requested to stop, beside a second one that wants its folder."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import DEVICES, dmd2, environment, runtime, train_options
from events import wait_until
from safetensors.torch import load_file


@pytest.mark.parametrize("device", DEVICES)
def test_killed_training_refuses_a_second_one_and_resumes_to_the_same_weights(
    device: str, folder: Path, tmp_path: Path, reported: list[str]
):
    def arguments_of(out: str) -> list[str]:
        start = folder / "noreg_ttur/networks.safetensors"
        return train_options(tmp_path, "dmd2_long", out, f"{out}-state", runtime=runtime(device), start=start)

    for name in ("teacher", "latents"):
        (tmp_path / name).symlink_to(folder / name)
    arguments = arguments_of("long")
    command = [sys.executable, "-m", "dmd2", "--threads", "1", *arguments]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    logs = (tmp_path / "long-state").glob
    wait_until(lambda: any(log.read_text().count("\n") >= 8 for log in logs("dmd2_long-*/log.jsonl")), process)
    process.send_signal(signal.SIGSTOP)  # it waits, in the middle of its run
    assert dmd2(*arguments) == 2
    assert f"in use by process {process.pid} on " in reported[0]
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    _, text = process.communicate(timeout=100)
    assert process.returncode == 143
    assert "error: SIGTERM: saved after iteration" in text
    assert "Traceback" not in text
    assert not (tmp_path / "long").exists(), "nothing is published of a run that is not finished"
    assert dmd2(*arguments) == 0
    assert dmd2(*arguments_of("straight")) == 0
    for name in ("generator", "networks"):
        resumed, straight = (load_file(tmp_path / out / f"{name}.safetensors") for out in ("long", "straight"))
        assert resumed.keys() == straight.keys()
        assert all(torch.equal(resumed[key], straight[key]) for key in resumed)
