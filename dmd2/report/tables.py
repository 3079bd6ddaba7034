"""The paper's tables with our measurements in separate columns. Does not import torch (used by the workflow).

A table file (`workflow/tables/tableN.yaml`) has all rows of the paper's table in its order. The paper's numbers and
the measured ones are in separate columns (`paper_fid`, `fid`): they are of different data unless the preset is the
paper's.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dmd2.config import Data
from dmd2.config.reading import parse, read_yaml
from dmd2.errors import UserError
from dmd2.files import read_json, write_text
from dmd2.report.columns import COLUMNS, TICK_TITLES
from dmd2.report.table_schema import FLOOR, LatencyRecord, Measure, MetricsRecord, Table

Cells = dict[str, Any]


def load_table(path: Path | str) -> Table:
    """Loads a table from a YAML file. Raises UserError naming the file and key."""
    return parse(Table, read_yaml(path), str(path))


def measured_entries(table: Table, preset: str) -> list[str]:
    """The entries (`MODEL/SAMPLER` or `floor`) whose metric records the table reads; unique, in order."""
    return list(dict.fromkeys(entry for row in table.rows_of(preset) for entry in table.entries_of(row, preset)))


def timed_entries(table: Table, preset: str) -> list[str]:
    """The entries whose latency fills `latency_s`: of each row with a model the first training seed's."""
    first = [entries[0] for row in table.rows_of(preset) if (entries := table.entries_of(row, preset))]
    return [entry for entry in dict.fromkeys(first) if entry != FLOOR and "latency_s" in table.measured]


def check_presets(table: Table, presets: Sequence[str], where: str) -> None:
    """Raises UserError, starting with `where`, for an unknown preset in a table or row."""
    named = [("`preset`", [table.preset] if table.preset else []), ("`seeds`", list(table.seeds))]
    for row in table.rows:
        keys = {"only": row.only, "instead": row.instead, "measured_on": row.measured_on}
        named += [(f"row {row.id}: `{key}`", list(names)) for key, names in keys.items()]
    for key, names in named:
        if unknown := [name for name in names if name not in presets]:
            raise UserError(f"{where}: {key}: no preset {unknown[0]!r}; known: {', '.join(sorted(presets))}")


def read_records(files: Mapping[str, Path]) -> dict[str, dict[str, Any] | None]:
    """Reads the metric records by entry; None if the file does not exist yet."""
    return {entry: read_json(path) if Path(path).exists() else None for entry, path in files.items()}


def with_latency(record: Mapping[str, Any], timed: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A metrics record with the medians of a latency record, and how they were measured.

    Raises UserError, starting with `where`, for a malformed record.
    """
    found = parse(LatencyRecord, timed, where)
    each = {f"latency_{name}_s": times.model_dump() for name, times in found.seconds}
    each["latency_s"] = each.pop("latency_total_s")
    measures = {name: {"mean": times["median"], "sd": times["sd"]} for name, times in each.items()}
    how = f"batch 1, median ± deviation of {found.repeats} images after {found.warm_up}"
    protocol = f"{found.device}, {found.precision}, {how}"
    return {**record, "metrics": {**record["metrics"], **measures}, "latency_protocol": protocol}


def rows(
    table: Table,
    records: Mapping[str, Mapping[str, Any] | None],
    preset: str | None,
    data: Data | None,
    files: Mapping[str, Path] | None = None,
) -> list[Cells]:
    """The cells of all rows in the table's order, keyed by `table.columns()`; None for an empty cell.

    Without a preset nothing is measured. `source` is `measured`, `quoted` (from the paper) or `pending`. `records` maps
    the entries of `measured_entries` to metric records; a row with a missing one is pending. Raises UserError for a
    malformed record, naming its file in `files` and the key.
    """
    parsed = {
        entry: parse(MetricsRecord, record, str((files or {}).get(entry, f"metrics of {entry}")))
        for entry, record in records.items()
        if record is not None
    }
    columns = table.columns()
    side = data and data.resolution
    where = {"preset": preset, "dataset": data and f"{data.source} {side}x{side}", "resolution": side}
    return [{column: cells.get(column) for column in columns} for cells in _cells(table, parsed, where)]


def _cells(table: Table, records: Mapping[str, MetricsRecord], where: Cells) -> Iterable[Cells]:
    for row in table.rows_of(where["preset"]):
        cells: Cells = {"row_id": row.id, "group": row.group, "method": row.method, "paper_nfe": row.nfe}
        cells |= {f"paper_{metric}": value for metric, value in row.paper.items()}
        cells |= {tick: "yes" if tick in row.ticks else "no" for tick in table.ticks if row.measure != FLOOR}
        entries = table.entries_of(row, where["preset"])
        missing = [entry for entry in entries if entry not in records]
        if missing:
            note = f"no metrics of {', '.join(missing)}" if where["preset"] else "the selected preset has other tables"
            cells |= {"source": "pending", "note": note} | where
        elif entries:
            cells |= {"source": "measured"} | where | _measured([records[entry] for entry in entries])
        elif row.pending:
            cells |= {"source": "pending", "note": row.pending}
        else:
            cells |= {"source": "quoted"}
        yield cells


def _measured(records: Sequence[MetricsRecord]) -> Cells:
    """The measured columns of a row from the records of its training seeds; all but the metrics are the first's."""
    record = records[0]
    cells: Cells = {}
    for name in COLUMNS:
        if name != "resolution":  # the data's, not a metric
            cells[name], cells[f"{name}_sd"] = _over_seeds([getattr(each.metrics, name) for each in records])
    made, model = record.provenance, record.model
    seeds = f"samples {record.seed}"
    trained = [each.model.seed for each in records if each.model is not None and each.model.seed is not None]
    if model is not None:
        cells |= model.model_dump(exclude={"seed"})
    if trained:
        seeds = f"training {', '.join(map(str, trained))}; {seeds}"
    return cells | {
        "training_seeds": len(trained) or None,
        "latency_protocol": record.latency_protocol,
        "nfe": record.nfe,
        "num_samples": record.num_samples,
        "num_blocks": record.num_blocks,
        "seeds": seeds,
        "protocol": "; ".join(f"{name} ({_choices(choices)})" for name, choices in record.protocols.items()),
        "features": f"{record.features.name} {record.features.sha256[:12]}",
        "reference": record.features.reference,
        "config_digest": " ".join(each.provenance.digest for each in records),
        "commit": made.commit,
    }


def _over_seeds(measures: Sequence[Measure | None]) -> tuple[float | None, float | None]:
    """Mean and standard deviation over the blocks of samples of one training seed, or over several seeds."""
    found = [measure for measure in measures if measure is not None]
    if not found:
        return None, None
    if len(found) == 1:
        return found[0].mean, found[0].sd
    means = [measure.mean for measure in found]
    return statistics.fmean(means), statistics.stdev(means)


def _choices(choices: Mapping[str, str]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in choices.items()).replace("_", " ")


def write_csv(table_rows: Sequence[Cells], path: Path | str) -> None:
    """Writes the rows as CSV with full precision, atomically; None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(table_rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table_rows)
    write_text(path, text.getvalue())


def write_markdown(table: Table, table_rows: Sequence[Cells], path: Path | str) -> None:
    """Writes the table as Markdown, atomically: rounded, with a caption about data, samples and features."""
    has_measured = any(row["preset"] for row in table_rows)
    columns = _markdown_columns(table, table_rows, has_measured)
    lines = [
        f"# Table {table.number}: {table.title}\n" if table.number else f"# {table.title}\n",
        _caption(table, table_rows, has_measured) + "\n",
        "| " + " | ".join(title for title, _ in columns) + " |",
        "|" + "---|" * len(columns),
    ]
    group = None
    for row in table_rows:
        texts = [_text(row, name) for _, name in columns]
        texts[0] = "" if row["group"] == group else texts[0]
        group = row["group"]
        lines.append("| " + " | ".join(texts) + " |")
    write_text(path, "\n".join([*lines, "", _sources(table_rows)]) + "\n")


def _markdown_columns(table: Table, table_rows: Sequence[Cells], has_measured: bool) -> list[tuple[str, str]]:
    """(title, CSV column) of the Markdown's columns: FID, and the metrics that any row has."""
    columns = [
        ("", "group"),
        ("Method", "method"),
        *((TICK_TITLES.get(tick, tick.replace("_", " ")), tick) for tick in table.ticks),
    ]
    if table.number and any(row.nfe for row in table.rows):
        columns.append(("passes (paper)", "paper_nfe"))
    columns += [(f"{COLUMNS[metric].title} (paper)", f"paper_{metric}") for metric in table.paper_metrics()]
    if has_measured:
        shown = [name for name in table.measured if name == "fid" or any(row[name] is not None for row in table_rows)]
        columns += [("passes", "nfe"), *((COLUMNS[name].title, name) for name in shown)]
        chosen = any(row["selection"] not in (None, "last") for row in table_rows)
        columns += [("checkpoint", "selection")] if chosen else []
        columns += [("iterations", "iterations"), ("generator updates", "generator_updates")] if table.compute else []
        columns += [("training CPU-s", "train_cpu_s")] if table.compute else []
    return [*columns, ("source", "source")]


def _caption(table: Table, table_rows: Sequence[Cells], has_measured: bool) -> str:
    data = table.paper_data
    paper = f"The columns marked (paper) are the figures of arXiv 2405.14867 on {data.description}. " if data else ""
    if not has_measured:
        return paper.strip()
    place = next(row for row in table_rows if row["preset"])
    if data and place["preset"] in data.presets:
        remark = "They are comparable with the paper's only at its number of samples and with its features."
    else:
        remark = "They are figures of other data, not the paper's, and comparable only with one another."
    columns = "The other columns are" if paper else "Everything is"
    text = f"{paper}{columns} measured on **{place['dataset']}** (preset `{place['preset']}`). {remark}"
    measured = [row for row in table_rows if row["source"] == "measured"]
    models = [row for row in measured if row["run"] != "data"] or measured
    counts = {
        f"{row['num_blocks']} x {row['num_samples']:,} samples, features {row['features']}, "
        f"moments of {'the data' if row['reference'] == 'data' else row['reference']}, protocol {row['protocol']}"
        for row in models
    }
    spread = (
        "Mean ± standard deviation, over blocks of samples of one trained model or, where a row says so, over seeds"
    )
    timed = sorted({row["latency_protocol"] for row in measured if row.get("latency_protocol")})
    text += f" Latency: {'; '.join(timed)}." if timed else ""
    return text + (f" {spread}: {'; '.join(sorted(counts))}." if counts else "")


def _sources(table_rows: Sequence[Cells]) -> str:
    """The legend of the column `source`, with the reasons for pending rows."""
    found = {_source(row) for row in table_rows}
    several = max((row["training_seeds"] or 0 for row in table_rows), default=0)
    notes = dict.fromkeys(row["note"] for row in table_rows if row["source"] == "pending")
    meanings = {
        "measured": "by this project, with the settings in the CSV beside this file",
        "measured, 1 seed": "the same, of one training seed: a small difference between two such rows may be chance",
        f"measured, {several} seeds": "the same, mean and deviation over training seeds",
        "quoted": "a published figure alone; the method is not part of this project",
        "pending": f"not measured here yet: {'; '.join(notes)}",
    }
    return "\n".join(f"- {source}: {meaning}" for source, meaning in meanings.items() if source in found)


def _source(row: Cells) -> str:
    """The text of the column `source`, with the number of training seeds of a measured row."""
    seeds = row["training_seeds"]
    return f"{row['source']}, {seeds} seed{'s' if seeds > 1 else ''}" if seeds else str(row["source"])


def _text(row: Cells, column: str) -> str:
    """The text of one cell in the Markdown."""
    if column == "source":
        return _source(row)
    value = row[column]
    if column in COLUMNS and column != "resolution":
        if row["source"] == "pending" or (column == "latency_s" and value is None and row["nfe"]):
            return "pending"
        return "" if value is None else rounded(value, row.get(f"{column}_sd"))
    if value is None:
        return ""
    if column.startswith("paper_"):
        return f"{value:.{_paper_decimals(column)}f}"
    if column == "train_cpu_s":
        return f"{value:,.0f}"
    return {"yes": "✓", "no": ""}.get(value, str(value)) if isinstance(value, str) else f"{value:,}"


def _paper_decimals(column: str) -> int:
    metric = COLUMNS.get(column.removeprefix("paper_"))
    return (metric and metric.decimals) or 0


def rounded(mean: float, sd: float | None = None) -> str:
    """`mean ± sd` with two significant digits of `sd`, or three of the mean without one."""
    if not sd:
        return f"{mean:#.3g}".rstrip(".")
    decimals = min(max(1 - math.floor(math.log10(sd)), 0), 6)
    return f"{mean:.{decimals}f} ± {sd:.{decimals}f}"
