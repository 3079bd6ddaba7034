"""Which devices `workflow/launch.sh` gives to stages that run side by side."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from events import wait_until

SCRIPT = Path(__file__).parents[2] / "workflow" / "launch.sh"
STAGE = """#!/usr/bin/env bash
echo "${CUDA_VISIBLE_DEVICES-unset}|$*" >"$ARGUMENTS.part" && mv "$ARGUMENTS.part" "$ARGUMENTS"
exec sleep "$STAGE_S"
"""


class Machine:
    """A machine with some device files, whose `python` notes the devices that it was shown, and lasts a while."""

    def __init__(self, folder: Path, num_devices: int):
        self.folder, self.num, self.started = folder, 0, []
        for name in ("dev", "bin", "tmp"):
            (folder / name).mkdir()
        for number in range(num_devices):
            (folder / "dev" / f"nvidia{number}").touch()
        (folder / "dev" / "nvidiactl").touch()
        (folder / "bin" / "python").write_text(STAGE)
        (folder / "bin" / "python").chmod(0o755)

    def start(self, gpus: int, seconds: float = 60, **env: str) -> tuple[subprocess.Popen[str], Path]:
        self.num += 1
        arguments = self.folder / f"arguments-{self.num}"
        surroundings = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "TMPDIR": str(self.folder / "tmp"),
            "DMD2_DEV": str(self.folder / "dev"),
            "STAGE_S": str(seconds),
            "ARGUMENTS": str(arguments),
            **env,
        }
        command = ["bash", str(SCRIPT), str(gpus), "train"]
        process = subprocess.Popen(command, env=surroundings, stderr=subprocess.PIPE, text=True, start_new_session=True)
        self.started.append(process)
        return process, arguments

    def devices(self, gpus: int, **how: str) -> str:
        """What a stage of `gpus` devices that has just begun is shown; it goes on."""
        process, arguments = self.start(gpus, **how)
        wait_until(arguments.exists, process)
        return arguments.read_text().partition("|")[0]


@pytest.fixture
def machine(tmp_path: Path):
    made = Machine(tmp_path, 3)
    yield made
    for process in made.started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def test_stages_side_by_side_are_shown_different_devices(machine: Machine):
    assert [machine.devices(1) for _ in range(3)] == ["0", "1", "2"]


def test_stage_without_gpus_is_shown_none(machine: Machine):
    assert machine.devices(0) == ""


def test_only_devices_that_the_user_allows_are_taken(machine: Machine):
    assert machine.devices(1, CUDA_VISIBLE_DEVICES="2,GPU-a") == "2"
    assert machine.devices(1, CUDA_VISIBLE_DEVICES="2,GPU-a") == "GPU-a"


def test_slurm_deals_out_its_own_devices(machine: Machine):
    assert machine.devices(1, SLURM_JOB_ID="7", CUDA_VISIBLE_DEVICES="1") == "1"
    assert machine.devices(1, SLURM_JOB_ID="8", CUDA_VISIBLE_DEVICES="1") == "1"


def test_machine_without_devices_is_left_alone(tmp_path: Path):
    bare = Machine(tmp_path, 0)
    try:
        assert bare.devices(1) == "unset"
    finally:
        bare.started[0].kill()
        bare.started[0].communicate()


def test_device_of_a_stage_that_was_killed_is_free_again(machine: Machine):
    assert [machine.devices(1) for _ in range(3)] == ["0", "1", "2"]
    os.killpg(machine.started[1].pid, signal.SIGKILL)
    assert machine.devices(1) == "1"


@pytest.mark.parametrize("none", ["-1", "NoDevFiles", "", "-1,0"])
def test_user_who_allows_no_device_keeps_that(machine: Machine, none: str):
    assert machine.devices(1, CUDA_VISIBLE_DEVICES=none) == none


def test_names_of_devices_are_no_patterns(machine: Machine):
    assert machine.devices(1, CUDA_VISIBLE_DEVICES="/*") == "/*"


def test_disk_without_locks_is_refused_in_one_line(machine: Machine):
    stub = machine.folder / "bin" / "flock"
    stub.write_text("#!/bin/sh\nexit 66\n")
    stub.chmod(0o755)
    process, arguments = machine.start(1)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 2
    assert message.startswith(f"error: {machine.folder}/tmp/dmd2-gpu-")
    assert message.endswith(
        "-0.lock cannot be locked (flock: status 66); set TMPDIR to a folder on a disk of this machine\n"
    )
    assert not arguments.exists()


def test_folder_that_cannot_be_written_is_refused_in_one_line(machine: Machine):
    (machine.folder / "tmp" / f"dmd2-gpu-{os.getuid()}-0.lock").mkdir()
    process, _ = machine.start(1)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 2
    assert message.endswith("-0.lock cannot be written; set TMPDIR to a folder of this machine\n")


def test_clone_on_a_machine_that_writes_crlf_starts_stages(tmp_path: Path):
    root = SCRIPT.parents[1]
    git = ["git", "-c", "user.name=tests", "-c", "user.email=tests@localhost", "-C"]
    (tmp_path / "origin/workflow").mkdir(parents=True)
    for name in (".gitattributes", "workflow/launch.sh"):
        (tmp_path / "origin" / name).write_bytes((root / name).read_bytes())
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "files"]):
        subprocess.run([*git, str(tmp_path / "origin"), *command], check=True)
    clone = ["clone", "-q", "-c", "core.autocrlf=true", "origin", "clone"]
    subprocess.run([*git, str(tmp_path), *clone], check=True)
    assert (tmp_path / "clone/workflow/launch.sh").read_bytes() == SCRIPT.read_bytes()
