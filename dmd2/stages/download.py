"""Files from outside: fetched, checked and listed."""

from __future__ import annotations

from pathlib import Path

from dmd2.downloads import FOLDER, Download, load_catalogue, needed, provide, state
from dmd2.errors import UserError
from dmd2.plan import Plan
from dmd2.presets import parse, read_mapping


def download(name: str, entry: str, record: Path, mirror: str | None) -> None:
    """The file `name` beside `record`, which is written once the file is known to be the one that `entry` describes."""
    if record.name != f"{name}.json":
        raise UserError(f"--record: {record} is not the record of {name}; it must be called {name}.json")
    provide(name, parse(Download, read_mapping(entry, "--entry"), f"--entry {name}"), mirror, record.parent)


def listing(workflow: Path, preset: str | None) -> str:
    """A line for each file from outside: its state, its place, and the keys that name it; then what to do."""
    catalogue = load_catalogue(workflow / "downloads.yaml")
    paths = {str(FOLDER / name): [entry.what] for name, entry in catalogue.items()}
    if preset is not None:
        plan = Plan(workflow, preset)
        paths = needed(plan.preset, [plan.run(file.stem) for file in sorted((workflow / "runs").glob("*.yaml"))])
    states = {path: state(path, catalogue) for path in paths}
    width, left = (max(map(len, column), default=0) for column in (states.values(), paths))
    lines = [f"{states[path]:{width}}  {path:{left}}  {', '.join(dict.fromkeys(keys))}" for path, keys in paths.items()]
    advice = [
        f"{path}: {catalogue[Path(path).name].advice(Path(path).name)}"
        for path, found in states.items()
        if found == "to be supplied"
    ]
    return "\n".join([*lines, *advice]) if lines else f"preset {preset} needs nothing from outside"
