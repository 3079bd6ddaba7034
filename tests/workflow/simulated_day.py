"""A day on a cluster in minutes: Snakemake itself runs the real plan, with stages that only sleep and checkpoint.

    python tests/workflow/simulated_day.py --seed 0

Jobs, their order, GPUs, retries and what is kept after an interruption are the workflow's own; `sleeping_stage.py`
stands in for the launcher. Node deaths come at the rate of Llama 3's training (arXiv 2407.21783, section 3.3.4: 419
unexpected interruptions of 16,384 GPUs in 54 days), times `--factor`, as a day of a few nodes would see none;
pre-emption is possible after two hours, the policy described by Kokolis et al. (arXiv 2410.21680), at an assumed rate.
Once in the day Snakemake and all jobs are killed. The command fails if anything trains twice, is lost, or is planned
again.
"""

import argparse
import json
import os
import signal
import subprocess
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from checkout import NOTHING, Checkout
from sleeping_stage import CHECKPOINT_EVERY, ITERATION, TRAININGS

DEATHS_PER_GPU_HOUR = 419 / (54 * 24 * 16_384)
PREEMPTIONS_PER_HOUR, PROTECTED_HOURS = 0.25, 2.0
GPUS_PER_NODE = 8
LAUNCH = '#!/usr/bin/env bash\nexec python3 -S -E {stage} "$@"\n'


@dataclass(frozen=True)
class Settings:
    """A day: GPUs at once, GPUs of a job by preset, simulated hours, and how often things break."""

    seed: int = 0
    gpus: int = 32
    presets: tuple[tuple[str, int], ...] = (("digits", 4), ("digits-t2i", 8))
    second_per_hour: float = 5.0
    factor: float = 100.0
    kill_after_hours: float = 6.0
    retries: int = 10
    targets: tuple[str, ...] = ()
    config: str = "mirror=none"  # changes nothing; `preset=NAME` chooses one

    def environment(self) -> dict[str, str]:
        deaths = DEATHS_PER_GPU_HOUR * GPUS_PER_NODE * self.factor  # a job loses its node, whatever its GPUs
        day = {"seed": self.seed, "second_per_hour": self.second_per_hour, "deaths": deaths}
        return {"DMD2_DAY": json.dumps(day | {"preemptions": PREEMPTIONS_PER_HOUR, "protected": PROTECTED_HOURS})}


def run(checkout: Checkout, settings: Settings) -> tuple[list[dict[str, Any]], list[float]]:
    """Runs the day in a checkout; returns the journal's lines and the times at which everything was killed.

    Raises AssertionError if a call fails or leaves something to do.
    """
    stage = Path(__file__).with_name("sleeping_stage.py")
    (checkout / "workflow/launch.sh").write_text(LAUNCH.format(stage=stage))
    overlay = {"presets": {name: {"gpus": gpus} for name, gpus in settings.presets}}
    given = {"overlay": overlay, "config": settings.config}
    limits = ["--cores", "512", "--resources", f"gpu={settings.gpus}", "--retries", str(settings.retries), "--no-hooks"]
    arguments, log = [*settings.targets, *limits], checkout / "said.log"
    killed = []

    def start() -> subprocess.Popen[str]:
        with log.open("w") as said:
            return checkout.start(*arguments, **given, env=settings.environment(), said=said)

    process = start()
    if settings.kill_after_hours:
        began = time.monotonic()
        while time.monotonic() < began + settings.kill_after_hours * settings.second_per_hour or not in_training(
            checkout
        ):
            assert process.poll() is None, f"everything ended before the kill: {log.read_text()}"
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        killed.append(time.time())
        unlocked = checkout.snakemake("--unlock", **given)
        assert unlocked.returncode == 0, unlocked.stdout
        process = start()
    assert process.wait() == 0, log.read_text()[-5000:]
    again = checkout.snakemake(*arguments, "-n", **given)
    assert NOTHING in again.stdout, again.stdout[-3000:]
    return journal_of(checkout), killed


def journal_of(checkout: Checkout) -> list[dict[str, Any]]:
    """The complete lines of the journal."""
    file = checkout / "state/journal.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def in_training(checkout: Checkout) -> bool:
    """Whether a student is being trained, and has saved."""
    last = {line["job"]: line["event"] for line in journal_of(checkout) if line["stage"] == "train"}
    return "saved" in last.values()


@dataclass
class Attempt:
    """One attempt of a job, from its lines in the journal."""

    gpus: int
    first: int  # iterations done before it
    last: int  # done at its end, saved or not
    saved: int  # what a later attempt could load
    started: float
    ended: float
    how: str


def attempts(journal: list[dict[str, Any]], killed: list[float]) -> dict[str, list[Attempt]]:
    """The attempts of each job; one without an end was killed with Snakemake."""
    found: dict[str, dict[int, Attempt]] = defaultdict(dict)
    for line in journal:
        number, done, now = line["attempt"], line["iteration"], line["time"]
        if line["event"] == "started":
            found[line["job"]][number] = Attempt(line["gpus"], done, done, done, now, now, "killed with Snakemake")
            continue
        attempt = found[line["job"]][number]
        attempt.last, attempt.ended = done, now
        if line["event"] != "node died":
            attempt.saved = done
        if line["event"] != "saved":
            attempt.how = line["event"]
    for some in found.values():
        for attempt in some.values():
            if attempt.how == "killed with Snakemake":
                attempt.ended = min(t for t in killed if t >= attempt.started)
    return {job: [some[number] for number in sorted(some)] for job, some in found.items()}


def check(journal: list[dict[str, Any]], found: dict[str, list[Attempt]]) -> None:
    """Nothing trains twice and nothing is lost. Raises AssertionError naming the job."""
    stages, totals = ({line["job"]: line[key] for line in journal} for key in ("stage", "total"))
    for job, some in found.items():
        finished = [attempt for attempt in some if attempt.how == "finished"]
        assert len(finished) == 1, f"{job} finished {len(finished)} times"
        assert finished[0] is some[-1], f"{job} was started again after it had finished"
        for before, after in pairwise(some):
            assert after.started >= before.ended, f"{job}: two attempts at once"
            if stages[job] in TRAININGS:
                assert after.first == before.saved, f"{job} went on at {after.first}, saved was {before.saved}"
                if before.how == "pre-empted":
                    assert after.first == before.last, f"{job} lost {before.last - after.first} iterations"
                if before.how == "node died":
                    assert before.last - after.first < CHECKPOINT_EVERY + 1, f"{job} lost more than a checkpoint"
        assert some[-1].last == totals[job]


def report(settings: Settings, journal: list[dict[str, Any]], found: dict[str, list[Attempt]]) -> dict[str, Any]:
    """Figures of the day in simulated hours; `idle` is the share of GPU-hours in which no job held a GPU."""
    every = [attempt for some in found.values() for attempt in some]
    start, end = min(attempt.started for attempt in every), max(attempt.ended for attempt in every)
    scale, stages = settings.second_per_hour, {line["job"]: line["stage"] for line in journal}
    trainings = {job for job in found if stages[job] in TRAININGS}
    held = sum((attempt.ended - attempt.started) / scale * attempt.gpus for attempt in every)
    lost = sum(
        ((attempt.ended - attempt.started) / scale - kept * ITERATION) * attempt.gpus
        for job, some in found.items()
        for attempt in some
        if attempt.how != "finished"
        for kept in [attempt.saved - attempt.first if job in trainings else 0]
    )
    capacity = (end - start) / scale * settings.gpus
    how: dict[str, int] = defaultdict(int)
    for attempt in every:
        how[attempt.how] += 1
    return {
        "jobs": len(found),
        "trainings": len(trainings),
        "attempts": len(every),
        **{name: how[name] for name in ("pre-empted", "node died", "killed with Snakemake", "finished")},
        "trainings finished twice": sum(sum(a.how == "finished" for a in found[job]) > 1 for job in trainings),
        "hours": round((end - start) / scale, 1),
        "GPU-hours held": round(held, 1),
        "GPU-hours done again": round(lost, 1),
        "GPUs idle": f"{1 - held / capacity:.0%}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Settings()
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--gpus", type=int, default=defaults.gpus, help="that can be used at one time")
    parser.add_argument("--factor", type=float, default=defaults.factor, help="of the published rate of node deaths")
    parser.add_argument("--second-per-hour", type=float, default=defaults.second_per_hour, help="of simulated time")
    parser.add_argument("--targets", nargs="*", default=["all", "results/deviations.csv"])
    given = vars(parser.parse_args())
    settings = Settings(**{**given, "targets": tuple(given["targets"])})
    with tempfile.TemporaryDirectory() as folder:
        checkout = Checkout.of_repository(Path(folder) / "dmd2")
        journal, killed = run(checkout, settings)
        found = attempts(journal, killed)
        check(journal, found)
        for name, value in report(settings, journal, found).items():
            print(f"{name:26} {value}")


if __name__ == "__main__":
    main()
