"""What a stage refuses, in which words: one line, status 2, no traceback."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import PLAN, dmd2, environment, options, sample_options, train_options

from dmd2.__main__ import main
from dmd2.errors import Interrupted
from dmd2.lineage.spec import Spec


def assert_refused(reported: list[str], words: str, *arguments: Any) -> None:
    assert dmd2(*arguments) == 2
    (message,) = reported
    assert words in message
    assert message.startswith("error: ")
    assert "\n" not in message


def changed(spec: Spec, **keys: Any) -> str:
    return json.dumps({**json.loads(spec.to_json()), **keys})


def test_spec_of_another_stage_is_refused(tmp_path: Path, reported: list[str]):
    arguments = options(spec=PLAN.latents.to_json(), manifest=tmp_path / "m.json")
    assert_refused(reported, "--spec is for the stage latents, not shards", "shards", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (changed(PLAN.shards, evaluatoin={}), "unknown key `evaluatoin`; did you mean 'evaluation'?"),
        (changed(PLAN.shards, data={"source": "digits", "resolution": 0}), "`data.resolution` is 0"),
        ("{nothing", "--spec: not valid YAML"),
        ("[]", "--spec: expected a mapping"),
        ("@no/such/file.json", "no/such/file.json: no such file"),
    ],
)
def test_spec_that_cannot_be_read_is_refused(text: str, words: str, tmp_path: Path, reported: list[str]):
    assert dmd2("shards", *options(spec=text, manifest=tmp_path / "m.json")) == 2
    assert any(words in message for message in reported)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"log_evry": 1}', "--runtime: unknown key `log_evry`; did you mean 'log_every'?"),
        ('{"keep_checkpoints": 1}', "--runtime: `keep_checkpoints` is 1"),
        ("{log", "--runtime: not valid YAML"),
    ],
)
def test_runtime_that_cannot_be_read_is_refused(text: str, words: str, tmp_path: Path, reported: list[str]):
    paths = {"images": tmp_path / "i.json", "manifest": tmp_path / "m.json"}
    assert_refused(reported, words, "latents", *options(spec=PLAN.latents.to_json(), runtime=text, **paths))


def test_missing_inputs_are_named(folder: Path, tmp_path: Path, reported: list[str]):
    lost = tmp_path / "lost/manifest.json"
    arguments = options(spec=PLAN.latents.to_json(), images=lost, manifest=tmp_path / "m.json")
    assert_refused(reported, f"{lost}: no such file", "latents", *arguments)
    reported.clear()
    lost = tmp_path / "lost.safetensors"
    assert_refused(reported, "lost.json: no such file", *sample_options(lost, "dmd/student", tmp_path / "m.json"))


def copied(folder: Path, name: str, to: Path) -> Path:
    for suffix in (".safetensors", ".json"):
        shutil.copy(folder / f"{name}{suffix}", to / f"copy{suffix}")
    return to / "copy.safetensors"


def test_damaged_weights_are_refused(folder: Path, tmp_path: Path, reported: list[str]):
    weights = copied(folder, "dmd/generator", tmp_path)
    content = bytearray(weights.read_bytes())
    content[-5] ^= 4
    weights.write_bytes(content)
    assert_refused(reported, "SHA-256 differs", *sample_options(weights, "dmd/student", tmp_path / "m.json"))


def test_weights_of_another_configuration_are_refused(folder: Path, tmp_path: Path, reported: list[str]):
    weights = folder / "noreg_ttur/generator.safetensors"
    arguments = sample_options(weights, "dmd/student", tmp_path / "m.json")
    words = f"made with configuration {PLAN.train('noreg_ttur').digest}, but this run expects"
    assert_refused(reported, words, *arguments)


def test_damaged_shard_stops_training_with_its_name(folder: Path, tmp_path: Path, reported: list[str]):
    shutil.copytree(folder / "latents", tmp_path / "latents")
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    shard = sorted((tmp_path / "latents").glob("*.tar"))[2]
    os.truncate(shard, shard.stat().st_size - 1024)
    assert_refused(reported, shard.name, *train_options(tmp_path, "noreg_ttur", "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "here.tar"), 2, "here.tar: disk full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 2, "disk full (Disk quota exceeded); free space"),
        (Interrupted(signal.SIGTERM, 12), 143, "SIGTERM: saved after iteration 12"),
        (Interrupted(signal.SIGUSR1, 12), 138, "SIGUSR1: saved after iteration 12"),
    ],
)
def test_full_disk_and_interruption_have_a_line_and_a_status(
    error: Exception, status: int, words: str, monkeypatch: pytest.MonkeyPatch, reported: list[str]
):
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("dmd2.stages.data.shards", fail)
    assert dmd2("shards", *options(spec=PLAN.shards.to_json(), manifest="m.json")) == status
    assert words in reported[0]


def test_ctrl_c_has_the_shells_status(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dmd2.stages.data.shards", fail)
    assert dmd2("shards", *options(spec=PLAN.shards.to_json(), manifest="m.json")) == 130


def test_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("dmd2.stages.data.shards", fail)
    monkeypatch.setattr(sys, "argv", ["dmd2", "shards", *options(spec=PLAN.shards.to_json(), manifest="m.json")])
    with pytest.raises(ZeroDivisionError):
        main()


def test_error_of_a_process_is_one_line_without_a_traceback(tmp_path: Path):
    arguments = ["shards", *options(spec=changed(PLAN.shards, stagee="x"), manifest=tmp_path / "m.json")]
    command = [sys.executable, "-m", "dmd2", "--log", str(tmp_path / "log"), *arguments]
    done = subprocess.run(command, check=False, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.endswith("error: --spec: unknown key `stagee`; did you mean 'stage'?")
    assert (tmp_path / "log").read_text().strip() == line
