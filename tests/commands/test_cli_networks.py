"""Imported students and settings of execution, by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import PLAN, RUNTIME, dmd2, options, train_options

from dmd2.config import StudentWeights
from dmd2.files import sha256
from dmd2.lineage.records import read_record
from dmd2.lineage.spec import Spec


def import_spec(weights: StudentWeights) -> Spec:
    train = PLAN.train("noreg_ttur")
    return Spec.of("import", "released", data=train.data, teacher=train.teacher, weights=weights)


def test_imported_student_is_the_network_that_was_exported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reported: list[str]
):
    source, out = folder / "noreg_ttur/generator.safetensors", tmp_path / "generator.safetensors"
    spec = import_spec(StudentWeights(path="/nowhere/generator.safetensors", sha256=sha256(source)))
    assert dmd2("import-student", *options(spec=spec.to_json(), generator=out)) == 2
    assert reported == [
        "error: generator.safetensors: no such weight file; put it there or correct the configured path"
    ]
    monkeypatch.setenv("DMD2_FILES", json.dumps({sha256(source): str(source)}))  # as the workflow says where it is
    assert dmd2("import-student", *options(spec=spec.to_json(), generator=out)) == 0
    assert read_record(out)["run"] == "released"
    assert sha256(out) == sha256(source)


def test_activation_checkpointing_changes_no_bit(folder: Path):
    runtime = json.dumps({**json.loads(RUNTIME), "activation_checkpointing": True})
    arguments = train_options(folder, "noreg_ttur", "recomputed", state="state2")
    assert dmd2(*(runtime if text == RUNTIME else text for text in arguments)) == 0
    for name in ("generator", "networks"):
        plain = read_record(folder / f"noreg_ttur/{name}.safetensors")["sha256"]
        assert read_record(folder / f"recomputed/{name}.safetensors")["sha256"] == plain


def test_teacher_that_is_trained_asks_for_its_latents(tmp_path: Path, reported: list[str]):
    made = {"state": tmp_path / "state", "weights": tmp_path / "t.safetensors", "train_log": tmp_path / "log.jsonl"}
    assert dmd2("teacher", *options(spec=PLAN.teacher.to_json(), runtime=RUNTIME, **made)) == 2
    assert reported == ["error: --latents is missing: this teacher is trained on them"]
