"""`dmd2 doctor`: whether this machine, its software and its scheduler can run the workflow, and what to change."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

State = Literal["ok", "note", "failed"]
WIDTH = 14
"""Characters of the column of names where lines are printed one by one."""


@dataclass(frozen=True)
class Check:
    """One line of the report: what was looked at, what was found and, unless that is all right, what to change.

    A `note` is something that is absent and may be so, such as GPUs; it fails nothing.
    """

    name: str
    state: State
    found: str
    change: str = ""


def ok(name: str, found: str) -> Check:
    """A check that passed."""
    return Check(name, "ok", found)


def note(name: str, found: str, change: str = "") -> Check:
    """Something that was not checked, or need not be there."""
    return Check(name, "note", found, change)


def failed(name: str, found: str, change: str) -> Check:
    """A check that failed, with what to change."""
    return Check(name, "failed", found, change)


def run(checks: Iterable[tuple[str, Callable[[], Iterable[Check]]]]) -> Iterator[Check]:
    """The results of checks, (name, function) each; one that breaks is a failed check and not the end."""
    for name, check in checks:
        try:
            yield from check()
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            yield failed(name, f"could not be checked: {reason}", "see the message, and report it if it is no help")


def text(checks: Iterable[Check]) -> str:
    """The report with one line per check."""
    rows = list(checks)
    width = max((len(row.name) for row in rows), default=0) if len(rows) != 1 else WIDTH
    return "\n".join(
        f"{row.state:6}  {row.name:{width}}  {row.found}{f'; {row.change}' if row.change else ''}" for row in rows
    )


def as_json(checks: Iterable[Check]) -> str:
    """The report as JSON: a list of checks, and whether all are right."""
    rows = list(checks)
    report = {"ok": all(row.state != "failed" for row in rows), "checks": [asdict(row) for row in rows]}
    return json.dumps(report, indent=1)
