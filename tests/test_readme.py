"""The README shows what the committed reference results say."""

from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_table_in_the_readme_is_the_committed_one():
    table = (ROOT / "results/reference/table1.md").read_text()
    assert table.split("\n", 2)[2].strip() in (ROOT / "README.md").read_text()
