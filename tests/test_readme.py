"""The documents show what the committed reference results say, stay short, and link to what is there."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("*/README.md"), *ROOT.glob("docs/*.md")]
LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([^)\s]+))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    ("page", "rows"),
    [
        ("README.md", {"table1": 6}),
        ("docs/deviations.md", {"deviations": 12}),
        ("docs/text_to_image.md", {"table2": 7, "table4": 4, "table5": 5, "table6": 3}),
    ],
)
def test_tables_in_a_page_are_the_committed_ones(page: str, rows: dict[str, int]):
    module = runpy.run_path(str(ROOT / "docs/figures/excerpts.py"))
    text = (ROOT / page).read_text()
    assert text == module["filled"](page), "run `python docs/figures/excerpts.py`"
    assert module["SHOWN"][page].keys() == rows.keys()
    for name, columns in module["SHOWN"][page].items():
        shown = text.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0].splitlines()
        assert (len(shown), shown[0]) == (2 + rows[name], f"| {' | '.join(columns)} |")


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110


def anchors(document: Path) -> set[str]:
    """The anchors of a Markdown file's headings, as GitHub and the site make them."""
    titles = HEADING.findall(BLOCK.sub("", document.read_text()))
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_what_is_there(document: Path):
    missing = []
    for link, anchor in LINK.findall(BLOCK.sub("", document.read_text())):
        target = document.parent / link if link else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(f"{link}#{anchor}" if anchor else link)
    assert missing == []


def test_paths_in_the_tree_are_there():
    lines = [line for block in BLOCK.findall((ROOT / "docs/tree.md").read_text()) for line in block.splitlines()[1:-1]]
    paths = [line.split()[0] for line in lines if line]
    assert len(paths) == len(set(paths)) > 100
    assert [path for path in paths if not (ROOT / path).exists()] == []
