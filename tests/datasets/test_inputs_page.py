"""The page on inputs names what the code takes and passes over."""

import re
from pathlib import Path

from dmd2.datasets.sources import CAPTIONED, SOURCES
from dmd2.datasets.sources.listing import (
    HIDDEN,
    OTHER,
    OTHER_IMAGES,
    OUTSIDE,
    REPLACED,
    SPLITS,
    SUFFIXES,
    SYSTEM_NAMES,
    UNKNOWN,
)
from dmd2.teachers.weights import READERS, SINGLE

PAGE = (Path(__file__).parents[2] / "docs" / "inputs.md").read_text()


def test_suffixes_are_those_that_are_read_and_those_that_count_as_unreadable():
    row = next(line for line in PAGE.splitlines() if line.startswith("| suffix |"))
    taken, otherwise = row.split("|")[2:4]
    assert set(re.findall(r"\.[a-z0-9]+", taken)) == SUFFIXES
    assert set(re.findall(r"\.[a-z0-9]+", otherwise)) == OTHER_IMAGES


def test_sources_are_those_of_the_code():
    table = PAGE.partition("## Sources")[2].partition("- **Splits")[0]
    named = {
        name
        for line in table.splitlines()
        for name in re.findall(r"`(\w+)`", line.split("|")[1] if "|" in line else "")
    }
    assert named == SOURCES.keys() | CAPTIONED.keys()


def test_reasons_system_names_splits_and_weight_files_are_named():
    for reason in (HIDDEN, OTHER, OUTSIDE, REPLACED, UNKNOWN):
        assert f"- *{reason}*" in PAGE
    for name in SYSTEM_NAMES:
        assert f"`{name}`" in PAGE.lower()
    splits = " ".join(PAGE.partition("**Splits.**")[2].partition("**Classes.**")[0].split())
    assert all(re.search(rf"\b{split}\b", splits) for split in SPLITS)
    assert all(f"`{name}`" in PAGE for name in (*READERS, *SINGLE))


def test_the_page_is_linked():
    root = Path(__file__).parents[2]
    assert "  - inputs.md\n" in (root / "mkdocs.yml").read_text()
    assert "](inputs.md)" in (root / "docs" / "index.md").read_text()
