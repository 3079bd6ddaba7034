"""The page of results: tables, pictures, curves, sheets, diagnostics, costs and provenance in one HTML file.

Self-contained (pictures are inlined, no script, nothing from a network), light or dark as the reader's system is, and
readable at the width of a phone. `snakemake --report` opens on it. Does not import torch.
"""

from __future__ import annotations

import base64
import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from dmd2.errors import UserError
from dmd2.files import read_json, write_text
from dmd2.report.figures import read_log
from dmd2.report.table_schema import Table
from dmd2.report.tables import load_table

TEMPLATE = Path(__file__).with_name("page.html")
NAME = "index.html"
PAPERS_DATA = ("imagenet64", "sd15", "sdxl")
"""Presets of the paper's networks and data."""

SAMPLES = {
    "compare.png": "Real images, the teacher and the students side by side. Look for variety within a column (class) "
    "or row (prompt): a collapsed model repeats one image although every single one looks right.",
}
CURVES = {
    "fid_curve.svg": "Distance to the real images during training (the paper's figure 9): lower is better; below, the "
    "spread within classes, which should stay near 1. With few samples a distance is too high: compare marks of this "
    "figure alone.",
    "curves.svg": "Losses and diagnostics. Look for a discriminator accuracy that stays near 1 (the GAN overpowers the "
    "student), a growing critic lag (the fake score does not follow) and a falling nearest / mean distance (collapse).",
    "brightness.svg": "Mean brightness of training samples (the paper's figure 8), or the deviation of latents. A line "
    "that swings is an unstable run; the grey line is the data's.",
}

# Name in the log -> (title, what is a problem, whether a value is one).
DIAGNOSTICS: dict[str, tuple[str, str, Any]] = {
    "neighbour_ratio": (
        "nearest / mean distance",
        "a nearest / mean distance below 0.15 (collapse)",
        lambda v: v < 0.15,
    ),
    "d_accuracy": ("discriminator accuracy", "a discriminator accuracy above 0.95", lambda v: v > 0.95),
    "gan_to_matching_ratio": (
        "GAN / matching gradient",
        "a GAN gradient over ten times the matching one",
        lambda v: v > 10,
    ),
    "critic_lag": ("critic lag", "a critic lag above 1", lambda v: v > 1),
    "saturated": ("outside [-1, 1]", "over half of the values outside [-1, 1]", lambda v: v > 0.5),
    "num_nonfinite": ("non-finite gradients", "non-finite gradients", lambda v: v > 0),
}

Costs = Mapping[str, Any]
"""What `dmd2.cost.spending.report` gives."""


def write(results: Path, workflow: Path, costs: Costs | None) -> Path:
    """Writes `index.html` to `results`, of the tables that are there, and returns its path.

    `workflow` is the folder with the tables' files. Raises UserError if `results` has no table.
    """
    found = {
        path.stem: _rows(path) for path in sorted(results.glob("table*.csv")) + sorted(results.glob("deviations.csv"))
    }
    if not found:
        raise UserError(
            f"{results}: no table (table1.csv, ...) is there; run the workflow first, such as `make table1`"
        )
    every = [row for rows in found.values() for row in rows]
    measured = [row for row in every if row["source"] == "measured"]
    presets = list(dict.fromkeys(row["preset"] for row in every if row["preset"]))
    sources = {name: load_table(workflow / "tables" / f"{name}.yaml") for name in found}
    content = {
        "headline": f"results on {', '.join(presets)}" if presets else "the paper's tables",
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "count": len(measured),
        "rows": len(every),
        "small": _warning(presets),
        "tables": [_table(_existing(results / f"{name}.md"), rows) for name, rows in found.items()],
        "presets": [_preset(results, preset, found, sources) for preset in presets],
        "diagnostics": [title for title, _, _ in DIAGNOSTICS.values()],
        "signs": ", ".join(sign for _, sign, _ in DIAGNOSTICS.values()),
        "costs": _costs(costs) if costs else None,
        "provenance": _provenance(measured),
        "software": _software(results, presets),
    }
    content["sections"] = list(_sections(content))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    write_text(results / NAME, environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(content) + "\n")
    return results / NAME


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path}: no such file, although its CSV is there; delete that too and run the workflow again")
    return path


def _warning(presets: Sequence[str]) -> str:
    small = [preset for preset in presets if preset not in PAPERS_DATA]
    if not small:
        return ""
    tests = " The figures of a smoke preset mean nothing." if any(name.startswith("smoke") for name in small) else ""
    return (
        f"{', '.join(small)}: small networks on small images. These figures are not the paper's and do not compare "
        f"with them.{tests}"
    )


def _sections(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "tables", "Tables"
    for preset in content["presets"]:
        yield f"samples-{preset['name']}", f"Images: {preset['name']}"
        if preset["curves"] or preset["diagnostics"]:
            yield f"training-{preset['name']}", f"Training: {preset['name']}"
    if content["costs"]:
        yield "costs", "Costs"
    yield "provenance", "Provenance"


def _table(path: Path, rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """A table's Markdown, which has the paper's figures and ours rounded for reading, as cells and notes.

    Method, the paper's FID and ours come first, so that they are seen together on a phone; rows that are only quoted
    come last.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    header, body = cells[0], cells[2:]
    first = [header.index(title) for title in ("Method", "FID (paper)", "FID") if title in header]
    order = [*first, *(i for i in range(1, len(header)) if i not in first)]  # column 0 is the group
    kinds = [_kind(title) for title in header]

    def shown(line: Sequence[str]) -> list[dict[str, str]]:
        return [{"text": line[i], "kind": kinds[i]} for i in order]

    return {
        "title": next((line.lstrip("# ") for line in lines if line.startswith("#")), path.stem),
        "header": shown(header),
        "body": _grouped({"row": row, "cells": shown(line)} for line, row in zip(body, rows, strict=True)),
        "notes": [_plain(line.removeprefix("- ")) for line in lines if line and line[0] not in "#|"],
    }


def _grouped(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines with those that are only quoted at the end, and the group's name at the first of each."""
    ordered = sorted(lines, key=lambda line: line["row"]["source"] == "quoted")
    before = ["", *(line["row"]["group"] for line in ordered)]
    return [
        {"source": line["row"]["source"], "group": group if (group := line["row"]["group"]) != last else "", **line}
        for line, last in zip(ordered, before, strict=False)
    ]


def _kind(title: str) -> str:
    if title == "Method":
        return "text name"
    if title in ("source", "checkpoint"):
        return "text"
    return "paper" if title.endswith("(paper)") else "fid" if title == "FID" else ""


def _plain(text: str) -> str:
    return text.replace("**", "").replace("`", "")


def _preset(
    results: Path, preset: str, tables: Mapping[str, Sequence[Mapping[str, str]]], sources: Mapping[str, Table]
) -> dict[str, Any]:
    figures = results / preset / "figures"
    logs = sorted((results / preset).glob("*/train_log.jsonl"))
    return {
        "name": preset,
        "samples": list(_pictures(figures, SAMPLES)),
        "curves": list(_pictures(figures, CURVES)),
        "sheets": list(_sheets(results / preset, preset, tables, sources)),
        "diagnostics": [run for log in logs if log.parent.name != "teacher" and (run := _diagnosis(log))],
    }


def _pictures(folder: Path, captions: Mapping[str, str]) -> Iterator[dict[str, str]]:
    for name, caption in captions.items():
        if (folder / name).exists():
            yield {"alt": name, "data": _data(folder / name), "caption": caption}


def _data(path: Path) -> str:
    """A picture as a data URI."""
    kind = "svg+xml" if path.suffix == ".svg" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _sheets(
    folder: Path, preset: str, tables: Mapping[str, Sequence[Mapping[str, str]]], sources: Mapping[str, Table]
) -> Iterator[dict[str, str]]:
    """The sheet of each measured row in the order of the tables, each set of samples once."""
    seen: dict[str, list[str]] = {}
    methods: dict[str, tuple[str, Mapping[str, str]]] = {}
    for name, rows in tables.items():
        cells = {row["row_id"]: row for row in rows if row["preset"] == preset and row["source"] == "measured"}
        for row in sources[name].rows_of(preset):
            entry = row.entry(preset)
            if row.id in cells and entry is not None and (folder / entry / "grid.png").exists():
                seen.setdefault(entry, []).append(row.id)
                methods.setdefault(entry, (row.method, cells[row.id]))
    if (real := folder / "figures/real.png").exists():
        yield {"title": "Real images", "caption": "what perfect samples would look like", "data": _data(real)}
    for entry, ids in seen.items():
        method, found = methods[entry]
        figure = f"FID {float(found['fid']):.3g}" if found["fid"] else ""
        passes = f"{found['nfe']} {'pass' if found['nfe'] == '1' else 'passes'}" if found["nfe"] else ""
        caption = " · ".join(part for part in (entry, passes, figure, ", ".join(ids)) if part)
        yield {"title": method, "caption": caption, "data": _data(folder / entry / "grid.png")}


def _diagnosis(log: Path) -> dict[str, Any] | None:
    """The last row of a run's log as cells; None for an imported run, whose log is empty."""
    rows = read_log(log)
    if not rows:
        return None
    last: dict[str, float] = {}
    for row in rows:
        last.update(row)
    values = [(last.get(name), bad) for name, (_, _, bad) in DIAGNOSTICS.items()]
    cells = [{"text": _short(value), "bad": value is not None and bool(bad(value))} for value, bad in values]
    return {"name": log.parent.name, "cells": cells}


def _short(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.3g}"


def _costs(costs: Costs) -> dict[str, Any]:
    def cells(row: Mapping[str, Any], key: str) -> list[str]:
        hours = [f"{row['gpu_hours']:.3g}", f"{row['cpu_hours']:.3g}"]
        spent = "not known" if row["energy_kwh"] is None else f"{row['energy_kwh']:.3g}"
        return [row["preset"], row[key] or "shared", str(row["jobs"]), *hours, spent]

    parts = [{"key": key, "rows": [cells(row, key) for row in costs[f"by_{key}"]]} for key in ("stage", "model")]
    total, idle_gpu = costs["total"], costs["idle_gpu_share"]
    gpus = f" and {idle_gpu:.0%} of {costs['gpus']} GPUs" if idle_gpu is not None else ""
    summary = (
        f"{total['jobs']} jobs took {total['gpu_hours']:.3g} GPU-hours and {total['cpu_hours']:.3g} CPU-hours. "
        f"While any of them ran, {costs['idle_core_share']:.0%} of {costs['cores']} cores{gpus} were idle."
    )
    return {"summary": summary, "parts": parts}


PROVENANCE = {
    "row_id": "row",
    "preset": "preset",
    "run": "run",
    "iterations": "iterations",
    "seeds": "seeds",
    "num_samples": "samples",
    "num_blocks": "blocks",
    "features": "features",
    "config_digest": "digest",
    "commit": "commit",
}


def _provenance(measured: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    rows = [[row.get(name) or "" for name in PROVENANCE] for row in measured]
    return {"header": list(PROVENANCE.values()), "rows": rows}


def _software(results: Path, presets: Sequence[str]) -> str:
    """The versions in the newest metrics record."""
    records = [path for preset in presets for path in (results / preset).glob("*/*/metrics.json")]
    if not records:
        return "not recorded"
    newest = max(records, key=lambda path: path.stat().st_mtime)
    versions = read_json(newest).get("provenance", {}).get("versions", {})
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "not recorded"
