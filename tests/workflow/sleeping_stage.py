"""Stands in for `workflow/launch.sh` in a simulated day: a stage that only sleeps, writes its outputs, and checkpoints.

Called as the rules call the launcher. What interrupts an attempt is drawn from the day's seed, the job's name and the
attempt's number, so that it does not depend on the machine. Uses the standard library alone: hundreds are started.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

OUTPUTS = {
    **dict.fromkeys(("shards", "latents", "pairs", "sample"), ("manifest",)),
    **dict.fromkeys(("components", "download"), ("record",)),
    **dict.fromkeys(("features", "select"), ("weights",)),
    **dict.fromkeys(("reference", "metrics", "curve", "grid", "compare", "configuration"), ("out",)),
    "teacher": ("weights", "train-log"),
    "train": ("generator", "networks", "snapshots", "train-log"),
    "table": ("csv", "markdown"),
    "curves": ("folder",),
}
FIGURES = ("curves.svg", "brightness.svg", "fid_curve.svg")
HOURS = {"shards": 0.5, "latents": 0.5, "pairs": 1.0, "sample": 0.3, "metrics": 0.3, "curve": 0.4, "components": 1.0}
"""Simulated hours of a stage; those of a training are drawn, all others take `OTHER`."""
OTHER = 0.05
TRAININGS = ("teacher", "train")
TRAINING_HOURS = (2.0, 6.0)
ITERATION = 0.05  # hours
CHECKPOINT_EVERY = 10  # iterations


class Day:
    """The settings of a simulated day, from the environment variable DMD2_DAY (JSON)."""

    def __init__(self) -> None:
        given = json.loads(os.environ["DMD2_DAY"])
        self.seed: int = given["seed"]
        self.second_per_hour: float = given["second_per_hour"]
        self.deaths: float = given["deaths"]  # per hour of an attempt
        self.preemptions: float = given["preemptions"]  # per hour of an attempt, after `protected` hours
        self.protected: float = given["protected"]

    def iterations(self, stage: str, job: str) -> int:
        hours = random.Random(f"{self.seed} {job}").uniform(*TRAINING_HOURS)
        return max(1, round((hours if stage in TRAININGS else HOURS.get(stage, OTHER)) / ITERATION))

    def interruptions(self, job: str, attempt: int) -> tuple[float, float]:
        """Hours after which the attempt's node dies, and after which it is pre-empted."""
        draw = random.Random(f"{self.seed} {job} {attempt}")
        death = draw.expovariate(self.deaths) if self.deaths else float("inf")
        return death, self.protected + draw.expovariate(self.preemptions) if self.preemptions else float("inf")


def parse(arguments: list[str]) -> tuple[str, dict[str, str]]:
    """The stage and its options; a positional argument is called by its number."""
    stage, options, words = "", {}, iter(arguments)
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            options[name] = value if equals else next(words)
        elif not stage:
            stage = word
        else:
            options[str(sum(key.isdigit() for key in options))] = word
    return stage, options


def outputs(stage: str, options: dict[str, str]) -> list[Path]:
    """The files that a stage writes: those of its options, and the records beside weights and statistics."""
    found = [Path(options[name]) for name in OUTPUTS[stage]]
    if stage == "curves":
        return [found[0] / name for name in FIGURES]
    return found + [path.with_suffix(".json") for path in found if path.suffix in (".safetensors", ".weights", ".npz")]


def main() -> None:
    gpus, day = sys.argv[1], Day()
    stage, options = parse(sys.argv[2:])
    job = options["log"].removeprefix("logs/").removesuffix(".log")
    state = Path("state") / job.replace("/", "-")
    state.mkdir(parents=True, exist_ok=True)
    attempt = len(list(state.glob("attempt-*"))) + 1
    (state / f"attempt-{attempt}").touch()
    saved = state / "checkpoint"
    start = int(saved.read_text()) if saved.exists() else 0
    facts = {"job": job, "stage": stage, "attempt": attempt, "gpus": 0 if ":" in gpus else int(gpus)}
    total = day.iterations(stage, job)
    death, preemption = day.interruptions(job, attempt)

    def note(event: str, iteration: int) -> None:
        with Path("state/journal.jsonl").open("a") as journal:  # a line is written at once
            line: dict[str, Any] = {**facts, "event": event, "iteration": iteration, "time": time.time()}
            journal.write(json.dumps(line | {"total": total}) + "\n")

    def save(iteration: int) -> None:
        if stage in TRAININGS:
            temporary = saved.with_suffix(".tmp")
            temporary.write_text(str(iteration))
            temporary.replace(saved)

    def end(event: str, iteration: int) -> NoReturn:
        note(event, iteration)
        if event == "node died":
            os.kill(os.getpid(), signal.SIGKILL)
        sys.exit(143)

    note("started", start)
    began = time.monotonic()
    for iteration in range(start + 1, total + 1):
        hours = (iteration - start) * ITERATION
        time.sleep(max(0.0, began + hours * day.second_per_hour - time.monotonic()))
        if facts["gpus"] and hours >= min(death, preemption):
            if death <= preemption:
                end("node died", iteration)
            save(iteration)
            end("pre-empted", iteration)
        if iteration % CHECKPOINT_EVERY == 0:
            save(iteration)
            note("saved", iteration)
    for path in outputs(stage, options):
        path.parent.mkdir(parents=True, exist_ok=True)
        if stage == "configuration":
            path.write_text(json.dumps({"preset": json.loads(options["0"]), "runs": json.loads(options["1"])}))
        else:
            path.write_text(json.dumps({"stands in for": job}))
    note("finished", total)


if __name__ == "__main__":
    main()
