"""A workflow that was killed or interrupted in the middle of a training goes on, and ends as if nothing had been."""

import json
import os
import signal
import subprocess
from pathlib import Path

import psutil
from checkout import Checkout
from events import wait_until

RUN = "dmd2"
TARGET = f"results/smoke/{RUN}/generator.safetensors"
OUTPUTS = ("generator.safetensors", "networks.safetensors", "snapshots/00000010.safetensors")
ITERATIONS = 20  # of preset smoke
OFTEN = {"runtime": {"checkpoint_every": 2}}  # execution settings: the run's digest stays that of the finished one
DEADLINE_S = 240


def without_the_student(finished: Checkout, folder: Path) -> Checkout:
    """The finished checkout as it was before the training of one run."""
    checkout = finished.copy(folder)
    (checkout / TARGET).unlink()
    return checkout


def state_of(checkout: Checkout) -> Path | None:
    """The run's state folder, which is named after the spec and what is read; None before it exists."""
    return next(iter((checkout / "state").glob(f"{RUN}-*")), None)


def in_the_middle(checkout: Checkout, process: subprocess.Popen[str]) -> int:
    """Waits for the first checkpoint and returns its iteration."""
    wait_until(lambda: (state := state_of(checkout)) is not None and (state / "newest.json").exists(), process)
    return last_saved(checkout)


def last_saved(checkout: Checkout) -> int:
    return json.loads((state_of(checkout) / "newest.json").read_text())["step"]


def assert_resumes_to_the_same_end(checkout: Checkout, finished: Checkout, at_least: int) -> None:
    """Runs the same command again: it goes on from a checkpoint and gives the finished run's files bit for bit."""
    done = checkout.snakemake(TARGET, "--cores", "2", overlay=OFTEN)
    assert done.returncode == 0, done.stdout
    log = (checkout / f"logs/smoke/train/{RUN}.log").read_text()
    resumed = int(log.partition(f"{RUN}: resuming after iteration ")[2].partition(f" of {ITERATIONS}")[0])
    assert at_least <= resumed < ITERATIONS
    assert_the_same_end(checkout, finished)


def assert_the_same_end(checkout: Checkout, finished: Checkout) -> None:
    for name in OUTPUTS:
        path = f"results/smoke/{RUN}/{name}"
        assert (checkout / path).read_bytes() == (finished / path).read_bytes(), f"{path} differs"


def test_workflow_killed_with_all_its_jobs_resumes_bit_for_bit(finished: Checkout, tmp_path: Path):
    checkout = without_the_student(finished, tmp_path / "dmd2")
    process = checkout.start(TARGET, "--cores", "2", overlay=OFTEN)
    in_the_middle(checkout, process)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    saved = last_saved(checkout)
    assert not (checkout / TARGET).exists()

    locked = checkout.snakemake(TARGET, "--cores", "2", overlay=OFTEN)
    assert locked.returncode != 0
    assert "--unlock" in locked.stdout
    assert checkout.snakemake(TARGET, "--unlock").returncode == 0
    assert_resumes_to_the_same_end(checkout, finished, at_least=saved)


def test_training_that_was_terminated_is_retried_by_the_same_call(finished: Checkout, tmp_path: Path):
    """What a scheduler does to a job that it wants to stop: the workflow itself goes on."""
    checkout = without_the_student(finished, tmp_path / "dmd2")
    process = checkout.start(TARGET, "--cores", "2", "--retries", "1", overlay=OFTEN)
    in_the_middle(checkout, process)
    (training,) = (
        child for child in psutil.Process(process.pid).children(recursive=True) if "train" in child.cmdline()
    )
    training.terminate()
    said, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, said
    assert "SIGTERM: saved after iteration" in said
    assert f"{RUN}: resuming after iteration" in (checkout / f"logs/smoke/train/{RUN}.log").read_text()
    assert_the_same_end(checkout, finished)


def test_interrupted_workflow_ends_in_order_and_goes_on(finished: Checkout, tmp_path: Path):
    checkout = without_the_student(finished, tmp_path / "dmd2")
    process = checkout.start(TARGET, "--cores", "2", overlay=OFTEN)
    first = in_the_middle(checkout, process)
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C sends
    said, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode != 0
    assert "Traceback" not in said
    assert not (checkout / TARGET).exists()
    saved = last_saved(checkout)
    assert first <= saved < ITERATIONS
    assert f"SIGINT: saved after iteration {saved}; run the same command to resume" in said
    assert_resumes_to_the_same_end(checkout, finished, at_least=saved)  # without --unlock
