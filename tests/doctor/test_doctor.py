"""`dmd2 doctor` names what to change; its exit status is for scripts."""

import json
import os
import re
import stat
import time
from pathlib import Path

import pytest
import torch
import typer
import yaml

import dmd2_kernels
from dmd2.commands.diagnosis import doctor
from dmd2.commands.planning import WORKFLOW
from dmd2.doctor import Check, folders, one_exchange, one_kernel, run, software
from dmd2.doctor.slurm import against, minutes_of, read_sinfo, site_settings, slurm

SINFO = """gpu*|up|1-00:00:00|gpu:a100:8(S:0-1)
gpu*|up|1-00:00:00|gpu:h100:8
cpu|up|infinite|(null)
old|down|30:00|gpu:2
"""


def found(checks: object) -> dict[str, str]:
    return {check.name: check.state for check in checks}  # type: ignore[attr-defined]


def test_a_machine_that_is_all_right_passes_and_a_failure_sets_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nothing")
    monkeypatch.setenv("DMD2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(folders, "LEAST_GB", 0.0)
    monkeypatch.setattr(software, "kernel", list)
    options = {"state": Path("state"), "checksums": False, "profile": Path("profiles/slurm"), "workflow": WORKFLOW}
    doctor(preset="smoke", configfile=None, as_json=True, **options)
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    states = {check["name"]: check["state"] for check in report["checks"]}
    assert states["python"] == states["packages"] == states["state folder"] == states["clock"] == "ok"
    assert states["locks"] == states["downloads"] == "ok"
    assert states["slurm"] == states["nccl"] == "note"
    assert not list((tmp_path / "state").iterdir()), "nothing is left behind"

    with pytest.raises(typer.Exit) as stopped:
        doctor(preset="imagenet64", configfile=None, as_json=False, **options)
    assert stopped.value.exit_code == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("failed"))
    assert "ILSVRC2012_img_train.tar  to be supplied; " in line


def test_a_kernel_is_launched_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    one_kernel.main()  # here by the interpreter
    right = dmd2_kernels.matching_loss

    def wrong(*inputs: torch.Tensor) -> dmd2_kernels.MatchingLoss:
        found = right(*inputs)
        return found._replace(loss=found.loss * (1.01 if dmd2_kernels.implementation(inputs[0]) != "reference" else 1))

    monkeypatch.setattr(dmd2_kernels, "matching_loss", wrong)
    with pytest.raises(ArithmeticError, match=r"the kernel gives .*, its definition"):
        one_kernel.main()


@pytest.mark.parametrize(("python", "state"), [("/bin/true", "ok"), ("/bin/false", "failed")])
def test_a_kernel_that_crashes_is_a_failure(python: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software.sys, "executable", python)
    [check] = software.kernel()
    assert check.state == state
    assert "Triton's interpreter" in check.found or torch.cuda.is_available()


@pytest.mark.parametrize("skew_s", [-30.0, 30.0])
def test_a_file_server_with_another_clock_is_named(skew_s: float) -> None:
    now = time.time()
    [check] = folders.clock(now + skew_s, now, now + 0.1)
    assert (check.state, check.found[:4]) == ("failed", "30 s")
    assert "synchronise the clocks" in check.change


def test_a_state_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state").write_text("a file in its place")
    [check] = folders.state_folder(tmp_path / "state", several_machines=False)
    assert check.state == "failed"
    assert str(tmp_path / "state") in check.found
    monkeypatch.setattr(folders, "LEAST_GB", 1e9)
    assert found(folders.room((tmp_path,)))[f"room in {tmp_path}"] == "failed"


def test_a_record_tells_an_altered_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in folders.needed(WORKFLOW, "cifar10", None):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"as published")
        Path(f"{name}.json").write_text(json.dumps({"sha256": folders.files.sha256(name)}))
    checks = list(folders.downloads(WORKFLOW, "cifar10", None, checksums=True))
    assert len(checks) > 2
    assert {check.state for check in checks} == {"ok"}
    Path("data/downloads/cifar-10-binary.tar.gz").write_bytes(b"altered")
    states = found(folders.downloads(WORKFLOW, "cifar10", None, checksums=True))
    assert [name for name, state in states.items() if state == "failed"] == [
        "file data/downloads/cifar-10-binary.tar.gz"
    ]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"slurm_partition": "gpuu"},
            "no partition gpuu; set default-resources.slurm_partition in .* did you mean 'gpu'",
        ),
        ({"slurm_partition": "gpu", "slurm_account": "lab"}, "account lab is not yours; .* did you mean 'lab2'"),
        ({"slurm_partition": "gpu", "gpu_model": "h200"}, "no GPU h200; set default-resources.gpu_model in .*"),
        ({"slurm_partition": "gpu", "gres": "gpu:v100:4"}, "no GPU v100"),
        ({"slurm_partition": "cpu", "gpu": 8}, "partition cpu has no GPUs"),
        ({"slurm_partition": "gpu", "runtime": 2880}, "runtime 2880 min is above the limit of gpu, 1440 min; lower"),
        ({"slurm_partition": "old"}, "partition old is down"),
        ({"slurm_partition": "CHANGE_ME"}, "slurm_partition is 'CHANGE_ME'; set default-resources.slurm_partition in"),
    ],
)
def test_site_settings_that_the_cluster_does_not_have_are_named(
    settings: dict[str, object], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "profile.v9+.yaml").write_text(yaml.safe_dump({"default-resources": settings}))
    checks = list(against(site_settings(tmp_path), read_sinfo(SINFO), ["lab2", "other"]))
    text = "; ".join(f"{check.found}; {check.change}" for check in checks)
    assert {check.state for check in checks} == {"failed"}
    assert re.search(reason, text), text
    assert str(tmp_path / "profile.v9+.yaml") in text


def test_a_site_file_is_compared_by_its_own_keys(tmp_path: Path) -> None:
    site = {
        "account": "lab2",
        "cpu": {"partition": None, "minutes": 240},
        "gpu": {"partition": "gpu", "model": "h100", "minutes": 1440},
    }
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    for accounts in (["lab2"], None):
        states = found(against(site_settings(tmp_path), read_sinfo(SINFO), accounts))
        assert states == {"slurm": "ok", "slurm cpu": "ok", "slurm gpu": "ok"}
    site["gpu"] = {"partition": "cpu"}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    [change] = [c.change for c in against(site_settings(tmp_path), read_sinfo(SINFO), None) if c.state == "failed"]
    assert change == f"set gpu.partition in {tmp_path}/site.yaml to one that has"


def test_limits_of_slurm_in_minutes() -> None:
    limits = {"30": 30, "30:00": 30, "12:00:00": 720, "2-12": 3600, "2-12:30:00": 3630, "infinite": None, "n/a": None}
    assert {limit: minutes_of(limit) for limit in limits} == limits


def test_slurm_that_does_not_answer_is_a_failure_and_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = tmp_path / "sinfo"
    stub.write_text("#!/bin/sh\necho 'slurm_load_partitions: Unable to contact slurm controller' >&2\nexit 1\n")
    stub.chmod(stub.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    [check] = slurm(tmp_path)
    assert check.state == "failed"
    assert "Unable to contact slurm controller" in check.found


def test_a_check_that_breaks_is_reported_and_the_others_go_on() -> None:
    def broken() -> list[Check]:
        raise RuntimeError("no such thing")

    checks = list(run([("one", broken), ("clock", lambda: folders.clock(1.0, 1.0, 1.0))]))
    assert [check.state for check in checks] == ["failed", "ok"]
    assert "no such thing" in checks[0].found


def test_processes_are_connected_and_summed() -> None:
    one_exchange.main(2, "gloo")
