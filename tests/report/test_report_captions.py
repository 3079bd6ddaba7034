"""The report's captions render as Snakemake renders them, without a warning of docutils."""

import io
import re
from pathlib import Path
from types import SimpleNamespace

import jinja2
import pytest
from docutils.core import publish_parts

FOLDER = Path(__file__).parents[2] / "workflow" / "report"
CAPTIONS = sorted(FOLDER.glob("*.rst"))
LINKS = "\n\n.. _Workflow: javascript:show_panel('workflow')\n.. _Statistics: javascript:show_panel('statistics')\n"


def render(path: Path, preset: str | None, **params: object) -> str:
    """The caption as HTML; anything docutils complains about fails."""
    named = preset or "digits"
    job = SimpleNamespace(
        config={"preset": preset} if preset else {},
        wildcards={"model": "dmd2", "run": "dmd2", "preset": named} if path.stem != "table" else {"table": "table1"},
        params=params | ({"preset": named} if path.stem == "table" else {}),
    )
    complaints = io.StringIO()
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(path.read_text(encoding="utf-8") + LINKS)
    settings = {"warning_stream": complaints, "report_level": 2}
    html = publish_parts(text.render(snakemake=job), writer="html", settings_overrides=settings)["html_body"]
    assert complaints.getvalue() == ""
    return " ".join(html.split())


def test_there_is_a_caption_for_every_kind_of_result():
    assert {path.stem for path in CAPTIONS} >= {
        "workflow", "table", "curves", "fid_curve", "brightness", "grid", "compare", "config"
    }  # fmt: skip


@pytest.mark.parametrize("path", CAPTIONS, ids=lambda path: path.stem)
def test_caption_names_the_preset_and_renders_cleanly(path: Path):
    assert "smoke" in render(path, "smoke")
    assert "digits" in render(path, None)  # the default preset


@pytest.mark.parametrize("path", [p for p in CAPTIONS if p.stem != "config"], ids=lambda path: path.stem)
def test_small_presets_say_that_the_figures_are_not_the_papers(path: Path):
    disclaimer = re.compile(r"not (of )?the paper['’]s")
    assert disclaimer.search(render(path, "digits"))
    assert disclaimer.search(render(path, "smoke"))
    assert not disclaimer.search(render(path, "imagenet64"))


def test_sample_count_of_the_curve_is_stated_where_the_rule_gives_it():
    path = FOLDER / "fid_curve.rst"
    assert "measured with 3594 samples" in render(path, "digits", samples=3594)
    assert "measured with" not in render(path, "digits")
