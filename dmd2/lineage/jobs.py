"""The jobs behind tables: what a row needs, found by following the inputs of its specs. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dmd2.lineage.plan import Plan
from dmd2.lineage.spec import Spec

RULES = {"import": "import_student"}
"""Rules that are not called as their stage is."""


@dataclass(frozen=True)
class Job:
    """One job of the workflow, and the keys of the jobs that it waits for."""

    spec: Spec
    needs: tuple[str, ...]

    @property
    def key(self) -> str:
        """Unique among the jobs of a preset: stage and name."""
        return key_of(self.spec)


def key_of(spec: Spec) -> str:
    """The key of the job that a spec describes."""
    return spec.stage if spec.name == spec.stage else f"{spec.stage} {spec.name}"


class Jobs:
    """The jobs of a preset, found on demand."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self._found: dict[str, Job] = {}

    def __getitem__(self, key: str) -> Job:
        return self._found[key]

    def metrics(self, entry: str) -> Job:
        """The measurement of an entry, or of the floor."""
        return self._add(self.plan.metrics(entry))

    def closure(self, keys: Iterable[str]) -> list[Job]:
        """The jobs called `keys` and all that they wait for, each once, what is waited for first."""
        ordered: dict[str, Job] = {}

        def visit(key: str) -> None:
            if key not in ordered:
                for need in self._found[key].needs:
                    visit(need)
                ordered[key] = self._found[key]

        for key in keys:
            visit(key)
        return list(ordered.values())

    def _add(self, spec: Spec) -> Job:
        key = key_of(spec)
        if key not in self._found:
            needs = tuple(self._add(needed).key for needed in spec.inputs)
            self._found[key] = Job(spec, needs)
        return self._found[key]


def rules(jobs: Sequence[Job]) -> dict[str, int]:
    """How many jobs there are of each rule of the workflow."""
    counts: dict[str, int] = {}
    for job in jobs:
        rule = "floor" if job.spec.name == "floor" else RULES.get(job.spec.stage, job.spec.stage)
        counts[rule] = counts.get(rule, 0) + 1
    return counts


def chain(plan: Plan, run: str) -> list[str]:
    """The runs that are trained one after the other for `run`, which is the last."""
    found = [run]
    while (parent := plan.run(found[0]).train.init_run) is not None:
        found.insert(0, parent)
    return found
