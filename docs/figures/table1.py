"""Puts the measured rows of results/reference/table1.md into the README: `python docs/figures/table1.py`."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
COLUMNS = ("Method", "FID (paper)", "passes", "FID", "pixel FD")
MARKED = re.compile(r"(?<=<!-- table1 -->\n)(.*)(?=<!-- /table1 -->)", re.DOTALL)


def excerpt(table: str) -> str:
    """The measured rows of a table in Markdown, in the columns above."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    header, _, *rows = lines
    kept = [dict(zip(header, row, strict=True)) for row in rows if row[header.index("source")].startswith("measured")]
    cells = [COLUMNS, ("---",) * len(COLUMNS), *([row[column] for column in COLUMNS] for row in kept)]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    table = excerpt((ROOT / "results/reference/table1.md").read_text())
    readme.write_text(MARKED.sub(lambda _: table, readme.read_text()))
