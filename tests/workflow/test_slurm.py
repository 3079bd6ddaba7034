"""The workflow on a real Slurm, by the commands of docs/slurm.md: whatever ends its jobs, the weights are those of an
uninterrupted run, bit for bit.

A training is frozen in the middle (SIGSTOP) while something happens to its job, so that no timing decides the outcome.
"""

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from checkout import NOTHING, Checkout
from cluster import Cluster, install, running, say

from dmd2.cost.job_times import read_jobs

REASON = "it installs and starts a Slurm; set DMD2_TEST_SLURM=1 to run it, as root"
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(os.environ.get("DMD2_TEST_SLURM") != "1", reason=REASON)]
PROFILE = ("--workflow-profile", "profiles/slurm")
# No accounting database here; a status every few seconds; files are on the same disk.
HERE = ("--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "1", "--latency-wait", "10")
CPU = {"partition": "gpu", "minutes": 30}
GPU = {**CPU, "model": "t1", "per_node": 4, "cpus": 1, "mem_mb": 1000, "warning_seconds": 10}
OFTEN = {"runtime": {"checkpoint_every": 2}}  # execution settings: the digests stay those of the finished run
OUTPUTS = ("generator.safetensors", "networks.safetensors")
EVENT_S, DEADLINE_S = 180, 600


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if reason := install():
        pytest.skip(reason)
    with running() as slurm:
        yield slurm


def write_site(checkout: Checkout, **gpu: object) -> None:
    (checkout / "profiles/slurm/site.yaml").write_text(yaml.safe_dump({"cpu": CPU, "gpu": {**GPU, **gpu}}))


class Disturber(threading.Thread):
    """Does something to the jobs of one rule, once each time one of them is in the middle of its training."""

    def __init__(self, checkout: Checkout, name: str, *events: Callable[["Training"], None]):
        super().__init__(daemon=True)
        self.events, self.failure = list(events), None
        self._checkout, self._name = checkout, name
        self.start()

    def run(self) -> None:
        try:
            job = None
            for event in self.events:
                training = Training.frozen(self._checkout, self._name, after=job)
                job = training.processes
                event(training)
        except BaseException as error:
            self.failure = error

    def assert_done(self) -> None:
        self.join(1)
        if self.failure is not None:
            raise AssertionError(f"{self._name}: {self.failure!r}") from self.failure
        assert not self.is_alive(), f"{self._name}: not every interruption happened"


class Training:
    """The processes of a training that has saved a checkpoint; they are stopped."""

    def __init__(self, processes: list[psutil.Process], job: str):
        self.processes, self.job = processes, job

    @classmethod
    def frozen(cls, checkout: Checkout, name: str, after: list[psutil.Process] | None) -> "Training":
        """Waits for a training by other processes than `after`, and for a checkpoint of its own."""
        end = time.monotonic() + DEADLINE_S
        began = time.time()
        while time.monotonic() < end:
            saved = list((checkout / "state").glob(f"{name}-*/newest.json"))
            if saved and (when := saved[0].stat().st_mtime) >= began:
                found = [process for process in trainings(checkout, name) if process not in (after or [])]
                if found and when >= found[0].create_time():
                    for process in found:
                        process.suspend()
                    return cls(found, found[0].environ()["SLURM_JOB_ID"])
            time.sleep(0.02)
        raise TimeoutError(f"no training of {name} in {DEADLINE_S} s")

    def resume(self) -> None:
        for process in self.processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()


def trainings(checkout: Checkout, name: str) -> list[psutil.Process]:
    """The ranks of a training, in the order of their start."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if line[1:4] != ["-P", "-m", "dmd2"] and line[1:3] != ["-m", "dmd2"]:
            continue
        if any(part.endswith(f"/{name}.log") for part in line) and process.cwd() == str(checkout.folder):
            found.append(process)
    return sorted(found, key=lambda process: process.create_time())


def until(condition: Callable[[], object], seconds: float = EVENT_S) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not in {seconds} s"
        time.sleep(0.2)


def command(*line: str, unless: Callable[[], bool] = lambda: False) -> None:
    """Runs a command of Slurm's, again if the controller is down, since another disturber may have stopped it.

    Not once its answer alone was lost, as `unless` says.
    """
    until(lambda: subprocess.run(line, check=False, capture_output=True).returncode == 0 or unless())


def state_of(job: str) -> str:
    return say("squeue", "-ht", "all", "-o%T", "-j", job)


def its_signal(training: Training) -> None:
    """It takes long to save: nothing that was signalled with it may end, and have Slurm kill what is left."""
    command("scancel", "--signal=TERM", training.job)
    time.sleep(5)
    training.resume()


def its_time_limit(training: Training) -> None:
    """The job's end comes: within 30 s, in which Slurm looks, it is warned or has its processes continued and ended."""

    def ended() -> bool:
        return state_of(training.job) in ("FAILED", "TIMEOUT")

    command("scontrol", "update", f"jobid={training.job}", "EndTime=now+1", unless=ended)
    until(ended)


def a_requeue(training: Training) -> None:
    command("scontrol", "requeue", training.job, unless=lambda: state_of(training.job) == "PENDING")
    start_again(training.job)


def start_again(job: str) -> None:
    """Starts a job that Slurm has put into the queue again; it would wait for two minutes."""
    until(lambda: state_of(job) == "PENDING")
    command("scontrol", "update", f"jobid={job}", "StartTime=now", unless=lambda: state_of(job) == "RUNNING")


class Call:
    """A call of Snakemake in the background, for the duration of a block."""

    def __init__(self, checkout: Checkout, target: str, *, config: str, overlay: dict = OFTEN):
        self._path = Path(f"{checkout.folder}.said")
        options = {"overlay": overlay, "config": f"preset=smoke {config}"}
        with self._path.open("w") as said:
            self._process = checkout.start(target, *PROFILE, *HERE, said=said, **options)

    def said(self) -> str:
        return self._path.read_text()

    def assert_succeeds(self, *disturbers: Disturber) -> None:
        """Waits for its end, and that of what was done to its jobs."""
        until(lambda: self._process.poll() is not None or any(each.failure for each in disturbers), DEADLINE_S)
        for each in disturbers:
            each.assert_done()
        assert self._process.returncode == 0, self.said()

    def __enter__(self) -> "Call":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()


def assert_resumed(checkout: Checkout, *runs: str) -> None:
    for name in runs:
        assert "resuming after iteration" in (checkout / f"logs/smoke/{name}.log").read_text(), name


def assert_the_same(checkout: Checkout, expected: Checkout, *runs: str) -> None:
    for name in runs:
        for path in (f"results/smoke/{name}/{file}" for file in OUTPUTS):
            assert (checkout / path).read_bytes() == (expected / path).read_bytes(), f"{path} differs"


class Down:
    """Slurm's controller, stopped for the duration of a block."""

    def __init__(self, cluster: Cluster):
        self._cluster = cluster

    def __enter__(self) -> None:
        self._cluster.stop("slurmctld")

    def __exit__(self, *error: object) -> None:
        self._cluster.start("slurmctld")
        self._cluster.wait_until_it_answers()


def test_table_comes_out_the_same_whatever_ends_its_jobs(
    cluster: Cluster, fresh: Checkout, finished: Checkout, tmp_path: Path
):
    checkout, elsewhere = (fresh.copy(tmp_path / name) for name in ("dmd2", "elsewhere"))
    for each in (checkout, elsewhere):
        write_site(each)

    def the_controllers_restart(training: Training) -> None:
        with Down(cluster):
            again, other = (
                each.snakemake("results/table1.csv", *PROFILE, *HERE, config="preset=smoke gpus=1")
                for each in (checkout, elsewhere)
            )
            assert "--unlock" in again.stdout
            assert other.returncode != 0
            assert "Slurm does not answer" in other.stdout
            until(lambda: "Slurm does not answer" in call.said())
        training.resume()

    with Call(checkout, "results/table1.csv", config="gpus=1") as call:
        disturbers = [
            Disturber(checkout, "noreg_ttur", its_signal),
            Disturber(checkout, "dmd2", its_time_limit, its_time_limit),
            Disturber(checkout, "dmd", a_requeue),
            Disturber(checkout, "dmd2_long", the_controllers_restart),
        ]
        call.assert_succeeds(*disturbers)
    assert_resumed(checkout, "train/noreg_ttur", "train/dmd2", "train/dmd")
    assert call.said().count("SIGTERM: saved after iteration") >= 3
    assert call.said().count("Trying to restart job") >= 3  # the signal, two time limits, what met no controller
    assert "logs/smoke/train/dmd.log, " not in call.said(), "no job of it failed: Slurm itself requeues"
    assert_the_same(checkout, finished, "noreg_ttur", "dmd2", "dmd", "dmd2_long")

    took = {job.name: job.seconds for job in read_jobs(checkout.folder)}
    assert all(took[f"logs/smoke/train/{name}.log"] > 1 for name in ("dmd", "dmd2", "noreg_ttur")), took

    shutil.rmtree(checkout / ".snakemake")
    lost = checkout.snakemake("results/table1.csv", "-n", *PROFILE, overlay=OFTEN, config="preset=smoke gpus=1")
    assert NOTHING in lost.stdout


def test_training_on_two_nodes_outlives_whatever_ends_it(cluster: Cluster, finished: Checkout, tmp_path: Path):
    checkout, expected = (finished.copy(tmp_path / name) for name in ("slurm", "here"))
    target = "results/smoke/dmd2/generator.safetensors"
    for each in (checkout, expected):
        (each / target).unlink()
    write_site(checkout)
    silent = {"runtime": {"checkpoint_every": 2, "collective_timeout_minutes": 0.1}}

    def a_dead_node(training: Training) -> None:
        cluster.kill_node("n1")
        training.resume()
        until(lambda: say("sinfo", "-hn", "n1", "-o%T").startswith("down"))  # SlurmdTimeout
        cluster.start("n1")
        start_again(training.job)

    def a_hanging_node(training: Training) -> None:
        training.processes[0].resume()

    with Call(checkout, target, config="gpus=1 nodes=2", overlay=silent) as call:
        disturber = Disturber(checkout, "dmd2", a_hanging_node, a_dead_node)
        here = expected.snakemake(target, "--cores", "2", "--resources", "gpu=2", config="preset=smoke gpus=2")
        assert here.returncode == 0, here.stdout
        call.assert_succeeds(disturber)
    assert_resumed(checkout, "train/dmd2")
    assert_the_same(checkout, expected, "dmd2")
    assert "another rank ended or was silent for longer than" in call.said()


def test_site_file_that_does_not_fit_stops_before_anything_is_submitted(
    cluster: Cluster, fresh: Checkout, tmp_path: Path
):
    checkout = fresh.copy(tmp_path / "dmd2")
    write_site(checkout, partition="gpus")
    wrong = checkout.snakemake("results/table1.csv", *PROFILE, *HERE, config="preset=smoke gpus=1")
    assert wrong.returncode != 0
    assert "site.yaml: gpu.partition is 'gpus', which this cluster does not have; did you mean 'gpu'?" in wrong.stdout
    assert "Traceback" not in wrong.stdout
    assert "submitted" not in wrong.stdout
