"""The rows of a benchmark's CSV as one table: time, bandwidth, launches and share of a step, by GPU and commit."""

import csv
from pathlib import Path

Row = dict[str, str]
PEAKS = {"A100": 2039.0, "H100 80GB HBM3": 3350.0, "H100 PCIe": 2000.0, "H200": 4800.0, "B200": 8000.0}
"""GB/s of a GPU's memory by its data sheet, by a part of its name."""
HEADINGS = (
    *("op", "form", "provider", "us", "GB/s", "of peak", "launches", "bytes", "of step"),
    *("GPU", "torch", "triton", "commit"),
)
FORMS = {"full": "forward + backward", "loss_and_grad": "loss and gradient"}


def peak_gb_per_s(gpu: str) -> float | None:
    """The peak bandwidth of a GPU's memory in GB/s; None if it is not in `PEAKS`."""
    return next((peak for name, peak in PEAKS.items() if name in gpu), None)


def _counted(rows: list[Row]) -> dict[tuple[str, ...], Row]:
    """The rows without a GPU, which have launches and bytes, by what they are of."""
    return {_subject(row): row for row in rows if row["gpu"] == "none"}


def _subject(row: Row) -> tuple[str, ...]:
    return tuple(row[key] for key in ("op", "case", "provider", "mode", "dtype", "memory_format"))


def _cells(row: Row, counted: Row | None) -> tuple[str, ...]:
    """The cells of a row; launches and bytes are those counted without a GPU, at the same commit alone."""
    nhwc = " nhwc" if row["memory_format"] == "channels_last" else ""
    own = row if row["launches"] else counted if counted and counted["commit"] == row["commit"] else None
    moved = f"{int(own['bytes_moved']) / int(own['bytes_floor']):.2f}x" if own and own["bytes_moved"] else ""
    measured = row["timing"] == "measured"
    rate, peak = row["achieved_GBps"], peak_gb_per_s(row["gpu"])
    return (
        f"{row['op']} {row['case']} {row['dtype']}{nhwc}",
        FORMS[row["mode"]],
        row["provider"],
        row["graph_us"] if measured else "pending",
        rate if measured else "pending",
        f"{100 * float(rate) / peak:.0f}%" if measured and rate and peak else "" if measured else "pending",
        own["launches"] if own else "",
        moved,
        f"{row['pct_of_step']}%" if row["pct_of_step"] else "",
        row["gpu"],
        row["torch"],
        row["triton"],
        row["commit"],
    )


def table(path: Path) -> str:
    """The rows of whole calls in the CSV: `us` is the GPU's own time, bytes are multiples of the floor."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    counted = _counted(rows)
    cells = [HEADINGS, *(_cells(row, counted.get(_subject(row))) for row in rows if row["mode"] in FORMS)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)
