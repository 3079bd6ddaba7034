"""`dmd2 doctor` names what to change; its exit status is for scripts."""

import json
import os
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
from dmd2.doctor.slurm import slurm


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


def slurm_that_says(answer: str, status: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sinfo` that answers, and a cluster without an accounting database."""
    for name, said, code in (("sinfo", answer, status), ("sacct", "", 1), ("sacctmgr", "", 1)):
        stub = folder / name
        stub.write_text(f"#!/bin/sh\necho '{said}'\nexit {code}\n")
        stub.chmod(stub.stat().st_mode | stat.S_IEXEC)
    (folder / "profile.v9+.yaml").write_text("slurm-status-command: squeue\n")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_the_site_file_is_compared_with_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm_that_says("gpu*|up|1-00:00:00|gpu:h100:8|112|2000000", 0, tmp_path, monkeypatch)
    site = tmp_path / "site.yaml"
    site.write_text(yaml.safe_dump({"gpu": {"partition": "gpu", "model": "h100"}}))
    assert found(slurm(tmp_path, 8)) == {"slurm": "ok", "slurm site": "ok", "slurm status": "ok"}
    site.write_text(yaml.safe_dump({"cpu": {"partition": "gpuu"}, "gpu": {"model": "h200", "minutes": 9999}}))
    wrong = [check for check in slurm(tmp_path, 8) if check.state == "failed"]
    assert [(check.found.split(" is ")[0], check.change) for check in wrong] == [
        (f"{site}: cpu.partition", "did you mean 'gpu'?"),
        (f"{site}: gpu.minutes", "use at most that"),
        (f"{site}: gpu.model", "did you mean 'h100'?"),
    ]


def test_a_way_to_ask_about_jobs_that_fails_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm_that_says("gpu*|up|1-00:00:00|gpu:h100:8|112|2000000", 0, tmp_path, monkeypatch)
    (tmp_path / "site.yaml").write_text("{}\n")
    (tmp_path / "profile.v9+.yaml").write_text("executor: slurm\n")
    [wrong] = [check for check in slurm(tmp_path, 8) if check.state == "failed"]
    assert (wrong.name, wrong.found.partition(" ")[0]) == ("slurm status", "`sacct`")
    assert wrong.change.startswith("set slurm-status-command: squeue in ")


def test_slurm_that_does_not_answer_is_a_failure_and_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm_that_says("Unable to contact slurm controller", 1, tmp_path, monkeypatch)
    [check] = slurm(tmp_path)
    assert check.state == "failed"


def test_a_check_that_breaks_is_reported_and_the_others_go_on() -> None:
    def broken() -> list[Check]:
        raise RuntimeError("no such thing")

    checks = list(run([("one", broken), ("clock", lambda: folders.clock(1.0, 1.0, 1.0))]))
    assert [check.state for check in checks] == ["failed", "ok"]
    assert "no such thing" in checks[0].found


def test_processes_are_connected_and_summed() -> None:
    one_exchange.main(2, "gloo")
