"""The targets of the workflow: tables with their presets, the entries they read, and sheets. Does not import torch.

A table has a default preset; `--config preset=NAME` selects another for all tables. A user's overrides apply to the
selected preset, or to the default of the first table; `presets: {NAME: {...}}` overrides any other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from dmd2.config.reading import merge, overrides, read_chain
from dmd2.errors import UserError, suggestion
from dmd2.lineage.plan import Plan
from dmd2.lineage.spec import Spec, files_in
from dmd2.report.table_schema import FLOOR, Table
from dmd2.report.tables import check_presets, load_table, measured_entries, timed_entries

RESERVED_PRESETS = frozenset({"bench", "reference", "downloads", "tables"})
"""Folders of `results/`, `data/` and `logs/` that do not belong to a preset."""
RESERVED_RUNS = frozenset({"components", "teacher", "features", "figures", FLOOR})
"""Folders of `results/PRESET/` that do not belong to a run."""


def names_in(folder: Path, reserved: frozenset[str] = frozenset()) -> list[str]:
    """The names of a folder's YAML files, which become folders of results; hidden files are ignored.

    Raises UserError for a name that is invalid, reserved, or equal to another up to case.
    """
    names = sorted(path.stem for path in folder.glob("*.yaml") if not path.name.startswith("."))
    folded: dict[str, str] = {}
    for name in names:
        where = f"{folder / name}.yaml"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            raise UserError(f"{where}: a name may only have letters, digits, - and _; rename the file")
        if name in reserved:
            raise UserError(f"{where}: {name} is the name of another folder of results; rename the file")
        if (other := folded.setdefault(name.lower(), name)) != name:
            raise UserError(f"{where}: {other} and {name} would share a folder of results on some disks; rename one")
    return names


def fills(folder: Path, preset: str, table: str, default: str) -> bool:
    """Whether a preset lists a table in `tables`; without a list: whether `default`, the table's preset, has none."""
    listed, default_listed = (read_chain(folder / "presets", name).get("tables") for name in (preset, default))
    return table in listed if listed is not None else default_listed is None


class Targets:
    """The tables, presets and runs of a workflow folder under one configuration of Snakemake.

    Raises UserError for an error in any table, and in the presets and runs that the tables use.
    """

    def __init__(self, folder: Path | str, config: Mapping[str, Any]):
        self.folder = Path(folder)
        self.presets = names_in(self.folder / "presets", RESERVED_PRESETS)
        self.runs = names_in(self.folder / "runs", RESERVED_RUNS)
        self.tables = {name: self._load(name) for name in names_in(self.folder / "tables")}
        defaults = [self.tables[name].preset for name in self.paper_tables if self.tables[name].preset]
        self._chosen: str | None = config.get("preset")
        self._main = self._chosen or next(iter(defaults), None)
        self._over = overrides(config)
        self._over_by_name: Mapping[str, Any] = config.get("presets") or {}
        self.plan = cache(self._plan)  # a decorator would keep all instances alive
        for preset in dict.fromkeys([*self.in_use, *self._over_by_name]):
            self._check(preset, self.sampled(preset))
        for table in self.tables:
            if preset := self.preset_of(table):
                self._check(preset, self.entries(table))

    def _check(self, preset: str, entries: Iterable[str]) -> None:
        """Raises UserError for an entry that a preset does not have."""
        for entry in entries:
            if entry != FLOOR:
                self.plan(preset).split(entry)

    def _load(self, name: str) -> Table:
        path = self.folder / "tables" / f"{name}.yaml"
        table = load_table(path)
        check_presets(table, self.presets, str(path))
        return table

    def _plan(self, preset: str) -> Plan:
        """The plan of a preset with the user's overrides."""
        over = self._over if preset == self._main else {}
        return Plan(self.folder, preset, merge(over, self._over_by_name.get(preset) or {}))

    def check_requested(self, targets: Iterable[str]) -> None:
        """Raises UserError for a path of results whose table, preset or run does not exist; no rule would make it."""
        for target in targets:
            first, *below = Path(target).parts or ("",)
            if first != "results" or not below:
                continue
            if len(below) == 1 and target.endswith((".csv", ".md")):
                known, what, name = list(self.tables), "table", Path(target).stem
            elif len(below) > 1 and below[0] not in RESERVED_PRESETS.union(self.presets):
                known, what, name = self.presets, "preset", below[0]
            elif len(below) > 2 and below[1] not in RESERVED_RUNS:
                known, what, name = self.runs, "run", re.sub(r"_seed[0-9]+$", "", below[1])
            else:
                continue
            if name not in known:
                raise UserError(f"{target}: there is no {what} {name}; {suggestion(name, known)}")

    def preset_of(self, table: str) -> str | None:
        """The preset of a table: the selected one, or the table's default.

        None for a table that is only quoted, or that the selected preset does not fill.
        """
        default = self.tables[table].preset
        if default is None or self._chosen is None:
            return default
        return self._chosen if fills(self.folder, self._chosen, table, default) else None

    def entries(self, table: str) -> list[str]:
        """The entries that a table reads."""
        preset = self.preset_of(table)
        return measured_entries(self.tables[table], preset) if preset else []

    def timed(self, table: str) -> list[str]:
        """The entries whose latency a table reads: the first of each row, if the preset measures it."""
        preset, content = self.preset_of(table), self.tables[table]
        measured = preset and self.plan(preset).preset.evaluation.latency is not None
        return timed_entries(content, preset) if preset and measured else []

    def table_spec(self, table: str) -> Spec:
        """The spec of a table's stage; without a preset all rows are quoted."""
        preset = self.preset_of(table)
        return self.plan(preset).table(self.entries(table), self.timed(table)) if preset else Spec.of("table", table)

    @cached_property
    def paper_tables(self) -> list[str]:
        """The tables of the paper, which are the default targets."""
        return [name for name, table in self.tables.items() if table.number is not None]

    @cached_property
    def built(self) -> list[str]:
        """The paper's tables that the selected preset fills; without one, all."""
        return [name for name in self.paper_tables if self._chosen is None or self.preset_of(name)]

    @cached_property
    def in_use(self) -> list[str]:
        """The presets of the paper's tables, unique."""
        return list(dict.fromkeys(preset for table in self.paper_tables if (preset := self.preset_of(table))))

    def _tables_on(self, preset: str) -> list[str]:
        """The paper's tables on a preset; for a preset that no table uses now, all that it fills."""
        own = [name for name in self.paper_tables if self.preset_of(name) == preset]
        defaults = {name: self.tables[name].preset for name in self.paper_tables}
        return own or [
            name for name, default in defaults.items() if default and fills(self.folder, preset, name, default)
        ]

    def sampled(self, preset: str) -> list[str]:
        """The entries MODEL/SAMPLER of a preset's tables, sorted."""
        entries = {e for name in self._tables_on(preset) for e in measured_entries(self.tables[name], preset)}
        return sorted(entries - {FLOOR})

    def panels(self, preset: str) -> dict[str, str]:
        """The panels of a preset's side-by-side sheet, from its tables' rows: title -> entry, the teacher first."""
        rows = [row for name in self._tables_on(preset) for row in self.tables[name].rows_of(preset)]
        found = {row.panel: entry for row in rows if row.panel and (entry := row.entry(preset))}
        return dict(sorted(found.items(), key=lambda panel: not panel[1].startswith("teacher/")))

    @cached_property
    def imported(self) -> list[str]:
        """The runs with released weights, which are not trained here."""
        return [run for run in self.runs if self._run_file(run).get("weights")]

    def _run_file(self, run: str) -> dict[str, Any]:
        return read_chain(self.folder / "runs", run)

    def students(self, preset: str) -> list[str]:
        """The runs that are trained on a preset and measured in one of its tables."""
        models = {entry.partition("/")[0] for entry in self.sampled(preset)}
        return [run for run in self.runs if run in models and run not in self.imported]

    def files(self, preset: str) -> dict[str, str]:
        """The external files of a preset and the runs: SHA-256 -> path."""
        found = files_in(self.plan(preset).preset.model_dump())
        for run in self.runs:
            found |= files_in(self._run_file(run))
        return found
