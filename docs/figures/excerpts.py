"""Copies measured rows of results/reference/ into the pages that show them: `python docs/figures/excerpts.py`."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
OF_TEXT = ("Method", "passes", "FID", "patch FID", "prompt accuracy", "prompt accuracy, held-out compositions")
SHOWN = {
    "README.md": {"table1": ("Method", "FID (paper)", "passes", "FID", "pixel FD")},
    "docs/deviations.md": {"deviations": ("Method", "FID", "pixel FD", "training CPU-s", "source")},
    "docs/ours.md": {"ours": ("Method", "FID", "pixel FD", "recall", "training CPU-s", "source")},
    "docs/text_to_image.md": {
        "table2": OF_TEXT,
        "table4": OF_TEXT,
        "table5": OF_TEXT,
        "table6": ("Method", "passes", "FID", "patch FID", "prompt accuracy", "diversity within prompts"),
    },
}
"""By page: its tables with the columns that it shows between `<!-- TABLE -->` and `<!-- /TABLE -->`."""


def excerpt(table: str, columns: tuple[str, ...]) -> str:
    """The measured rows of a table in Markdown, in those columns."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    header, _, *rows = lines
    kept = [dict(zip(header, row, strict=True)) for row in rows if row[header.index("source")].startswith("measured")]
    cells = [columns, ("---",) * len(columns), *([row[column] for column in columns] for row in kept)]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def filled(page: str) -> str:
    """The page with its excerpts as the reference tables have them now."""
    text = (ROOT / page).read_text()
    for name, columns in SHOWN[page].items():
        table = excerpt((ROOT / f"results/reference/{name}.md").read_text(), columns)
        marked = re.compile(rf"(?<=<!-- {name} -->\n)(.*)(?=<!-- /{name} -->)", re.DOTALL)
        text = marked.sub(lambda _, table=table: table, text)
    return text


if __name__ == "__main__":
    for page in SHOWN:
        (ROOT / page).write_text(filled(page))
