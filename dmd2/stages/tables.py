"""The stage that fills a table. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from dmd2.files import read_json
from dmd2.lineage.records import expect_digest, write_record
from dmd2.lineage.spec import Spec
from dmd2.report.tables import load_table, read_records, rows, with_latency, write_csv, write_markdown


class Records(NamedTuple):
    """Files with the metrics and the latency of entries; an entry without metrics is pending."""

    metrics: Mapping[str, Path]
    latency: Mapping[str, Path]


def table(spec: Spec, source: Path, files: Records, out_csv: Path, out_markdown: Path, content_id: str) -> None:
    """Writes the table of `source`. `content_id` identifies the source and the entries in the table's record."""
    content = load_table(source)
    records = read_records(files.metrics)
    for entry, record in records.items():
        if record is not None:
            expect_digest(files.metrics[entry], record, spec.upstream[entry])
    for entry, path in files.latency.items():
        timed = read_json(path)
        expect_digest(path, timed, spec.upstream[f"latency {entry}"])
        if (record := records.get(entry)) is not None:
            records[entry] = with_latency(record, timed, str(path))
    filled = rows(content, records, spec.name if spec.data else None, spec.data, files.metrics)
    write_csv(filled, out_csv)
    write_markdown(content, filled, out_markdown)
    write_record(out_csv, spec, content=content_id)
