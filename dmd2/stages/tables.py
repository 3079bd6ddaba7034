"""The stage that fills a table. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dmd2.lineage.records import expect_digest, write_record
from dmd2.lineage.spec import Spec
from dmd2.report.tables import load_table, read_records, rows, write_csv, write_markdown


def table(
    spec: Spec, source: Path, metrics: Mapping[str, Path], out_csv: Path, out_markdown: Path, content_id: str
) -> None:
    """Writes the table of `source` with the metric records by entry; an entry without a file is pending.

    `content_id` identifies the source and the entries in the table's record.
    """
    content = load_table(source)
    records = read_records(metrics)
    for entry, record in records.items():
        if record is not None:
            expect_digest(metrics[entry], record, spec.upstream[entry])
    filled = rows(content, records, spec.name if spec.data else None, spec.data, metrics)
    write_csv(filled, out_csv)
    write_markdown(content, filled, out_markdown)
    write_record(out_csv, spec, content=content_id)
