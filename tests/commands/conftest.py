"""What the stages made, and the errors they reported."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import PLAN, RUNTIME, dmd2, options, train_options


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, latents, a teacher, its pairs, and two students, made by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    shards, latents = folder / "shards/manifest.json", folder / "latents/manifest.json"
    teacher = folder / "teacher/teacher.safetensors"
    pairs = folder / "pairs/manifest.json"
    assert dmd2("shards", *options(spec=PLAN.shards.to_json(), manifest=shards)) == 0
    assert dmd2("latents", *options(spec=PLAN.latents.to_json(), images=shards, manifest=latents)) == 0
    made = {
        "latents": latents,
        "state": folder / "state",
        "weights": teacher,
        "train_log": folder / "teacher/log.jsonl",
    }
    assert dmd2("teacher", *options(spec=PLAN.teacher.to_json(), runtime=RUNTIME, **made)) == 0
    assert dmd2("pairs", *options(spec=PLAN.pairs.to_json(), teacher=teacher, manifest=pairs)) == 0
    assert dmd2(*train_options(folder, "dmd", "dmd", pairs=pairs)) == 0
    assert dmd2(*train_options(folder, "noreg_ttur", "noreg_ttur")) == 0
    return folder


@pytest.fixture
def reported() -> Iterator[list[str]]:
    """The errors that the command line reported."""
    messages: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dmd2").addHandler(handler)
    yield messages
    logging.getLogger("dmd2").removeHandler(handler)
