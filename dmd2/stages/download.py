"""Fetches, checks and lists external files."""

from __future__ import annotations

from pathlib import Path

from dmd2.config import Run
from dmd2.config.reading import overrides, parse, read_mapping, read_yaml
from dmd2.downloads.catalogue import FOLDER, Download, load_catalogue, needed_downloads, provide, state
from dmd2.errors import UserError
from dmd2.lineage.plan import Plan
from dmd2.report.table_schema import FLOOR
from dmd2.report.tables import load_table, measured_entries
from dmd2.report.targets import fills


def download(name: str, entry: str, record: Path, mirror: str | None) -> None:
    """Fetches the file `name` next to `record`, which is written after the file was checked against `entry`."""
    if record.name != f"{name}.json":
        raise UserError(f"--record: {record} is not the record of {name}; it must be called {name}.json")
    provide(name, parse(Download, read_mapping(entry, "--entry"), f"--entry {name}"), mirror, record.parent)


def listing(workflow: Path, preset: str | None, over: Path | None = None) -> str:
    """A line for each external file: state, path and the keys that name it; then what the user has to do."""
    catalogue = load_catalogue(workflow / "downloads.yaml")
    paths = {str(FOLDER / name): [entry.what] for name, entry in catalogue.items()}
    if preset is not None:
        paths = needed(workflow, preset, over)
    states = {path: state(path, catalogue) for path in paths}
    width, left = (max(map(len, column), default=0) for column in (states.values(), paths))
    lines = [f"{states[path]:{width}}  {path:{left}}  {', '.join(dict.fromkeys(keys))}" for path, keys in paths.items()]
    advice = [
        f"{path}: {catalogue[Path(path).name].advice(Path(path).name)}"
        for path, found in states.items()
        if found == "to be supplied"
    ]
    return "\n".join([*lines, *advice]) if lines else f"preset {preset} needs nothing from outside"


def fetch(workflow: Path, preset: str, mirror: str | None, over: Path | None = None) -> None:
    """Fetches and checks all external files of a preset, for machines that are offline during jobs.

    Raises UserError at the end with one line for each file that could not be fetched.
    """
    catalogue = load_catalogue(workflow / "downloads.yaml")
    problems = []
    for path in map(Path, needed(workflow, preset, over)):
        if path.parent == FOLDER and path.name in catalogue:
            try:
                provide(path.name, catalogue[path.name], mirror)
            except UserError as error:
                problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def needed(workflow: Path, preset: str, over: Path | None) -> dict[str, list[str]]:
    """The external files of a preset, overridden by the YAML file `over`: path -> keys that name it."""
    plan = Plan(workflow, preset, overrides(read_yaml(over)) if over else {})
    return needed_downloads(plan.preset, _runs(plan, workflow))


def _runs(plan: Plan, workflow: Path) -> list[Run]:
    """The runs in the tables of a preset, and those that initialise them (`init_run`)."""
    paths = sorted((workflow / "tables").glob("*.yaml"))
    tables = [
        table
        for path in paths
        if (table := load_table(path)).preset and fills(workflow, plan.preset.name, path.stem, table.preset)
    ]
    models = [entry.partition("/")[0] for table in tables for entry in measured_entries(table, plan.preset.name)]
    names = [model for model in dict.fromkeys(models) if model not in ("teacher", FLOOR)]
    for name in names:  # grows by the parents while iterating
        parent = plan.run(name).train.init_run
        if parent is not None and parent not in names:
            names.append(parent)
    return [plan.run(name) for name in names]
