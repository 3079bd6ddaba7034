"""Which edit runs which stage again: the digests of every stage before and after an edit."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from dmd2.config.reading import merge
from dmd2.lineage.plan import Plan
from dmd2.lineage.spec import VERSIONS, Spec

FOLDER = Path(__file__).parents[2] / "workflow"
RUNS = ("dmd", "noreg_ttur", "dmd2", "dmd2_long", "gan")
TEACHER_ENTRIES = ("teacher/ode", "teacher/sde")
CHOSEN = ("dmd2/best", "dmd2/ablation")
ENTRIES = (*TEACHER_ENTRIES, *(f"{run}/student" for run in RUNS), *CHOSEN)
BEST = {"samplers": {"best": {"kind": "few_step", "checkpoint": "best"}}}


def digests(plan: Plan) -> dict[str, str]:
    """The digest of every stage, and the string that Snakemake compares."""
    specs = {name: getattr(plan, name) for name in ("shards", "latents", "teacher", "pairs", "features", "reference")}
    specs["floor"] = plan.metrics("floor")
    for run in RUNS:
        specs[f"train {run}"], specs[f"curve {run}"] = plan.train(run), plan.curve(run)
    for entry in CHOSEN:
        specs[f"select {entry}"] = plan.select(entry)
    for entry in ENTRIES:
        specs[f"sample {entry}"], specs[f"metrics {entry}"] = plan.sample(entry), plan.metrics(entry)
    return {name: spec.digest for name, spec in specs.items()}


def digits(folder: Path = FOLDER, overrides: dict[str, Any] | None = None) -> dict[str, str]:
    return digests(Plan(folder, "digits", merge(BEST, overrides or {})))


BEFORE = digits()


def changed(overrides: dict[str, Any]) -> set[str]:
    after = digits(overrides=overrides)
    return {name for name in BEFORE if BEFORE[name] != after[name]}


def of_runs(*runs: str) -> set[str]:
    return {name for name in BEFORE if name.split()[-1].partition("/")[0] in runs}


def of_entries(*entries: str) -> set[str]:
    return {name for name in BEFORE if name.split()[-1] in entries}


def all_of(*stages: str) -> set[str]:
    return {name for name in BEFORE if name.split()[0] in stages}


TEACHER = {"teacher", "pairs", *of_runs(*RUNS)} | {f"{s} {e}" for s in ("sample", "metrics") for e in TEACHER_ENTRIES}
BY_CURVE = {"select dmd2/best", "sample dmd2/best", "metrics dmd2/best"}
MEASURES = all_of("metrics", "curve", "floor") | BY_CURVE

TABLE: list[tuple[dict[str, Any], set[str]]] = [
    # Words, and how to execute: nothing.
    ({"description": "other words"}, set()),
    ({"runtime": {"log_every": 7, "checkpoint_every": 9, "sample_batch_size": 3, "device": "cpu"}}, set()),
    ({"gpus": 2}, set()),
    # The data: everything, unless it is merely elsewhere.
    ({"data": {"shard_size": 250}}, set(BEFORE)),
    ({"data": {"image_format": "webp"}}, set(BEFORE)),
    ({"data": {"path": "elsewhere"}}, set()),
    ({"data": {"max_unreadable": 7}}, set()),
    # The teacher: what it trains and makes; no latents (they follow its kind), no feature statistics.
    ({"teacher": {"training": {"iterations": 1300}}}, TEACHER),
    ({"teacher": {"training": {"seed": 1}}}, TEACHER),
    ({"teacher": {"network": {"num_blocks": 2}}}, TEACHER),
    ({"teacher": {"sigma_max": 60}}, TEACHER),
    # Features: what is measured with them; nothing is trained or sampled.
    ({"features": {"epochs": 7}}, MEASURES | {"features", "reference"}),
    ({"features": {"reference": {"path": "published.npz"}}}, MEASURES | {"reference"}),
    # Pairs: the run that reads them.
    ({"pairs": {"num_pairs": 2500}}, {"pairs", *of_runs("dmd")}),
    # Samplers: the entries they make, and the pairs of the one that makes pairs.
    ({"samplers": {"sde": {"s_churn": 30}}}, of_entries("teacher/sde")),
    (
        {"samplers": {"ode": {"num_steps": 20}}},
        {"sample teacher/ode", "metrics teacher/ode", "pairs", *of_runs("dmd")},
    ),
    ({"samplers": {"new": {"kind": "heun", "num_steps": 5}}}, set()),
    ({"samplers": {"student": {"precision": "bf16"}}}, {s for s in all_of("sample", "metrics") if "student" in s}),
    ({"samplers": {"ablation": {"checkpoint": 500}}}, of_entries("dmd2/ablation")),
    # Evaluation: each stage by the keys that it reads; nothing is trained.
    ({"evaluation": {"num_samples": 1000}}, all_of("sample", "metrics", "floor")),
    ({"evaluation": {"num_blocks": 2}}, all_of("sample", "metrics", "floor")),
    ({"evaluation": {"seed": 1}}, MEASURES | all_of("sample")),
    ({"evaluation": {"protocols": ["dmd2"]}}, MEASURES - {"floor"} | all_of("sample")),
    ({"evaluation": {"protocols": ["edm", "dmd2"]}}, all_of("sample", "metrics")),
    ({"evaluation": {"num_shown": 10}}, set()),
    ({"evaluation": {"streamed": True}}, all_of("sample", "metrics")),
    ({"evaluation": {"curve_samples": 599}}, all_of("curve") | BY_CURVE),
    # Training: all runs, or the one, with those that start from it.
    ({"train": {"batch_size": 32}}, of_runs(*RUNS)),
    ({"train": {"gan_loss": "hinge"}}, of_runs(*RUNS)),
    ({"runs": {"dmd": {"regression_weight": 0.5}}}, of_runs("dmd")),
    ({"runs": {"noreg_ttur": {"critic_learning_rate": 3e-3}}}, of_runs("noreg_ttur", "dmd2_long")),
    ({"runs": {"dmd2_long": {"iterations": 1100}}}, of_runs("dmd2_long")),
    # The same thing in other words: nothing.
    ({"train": {"gan_generator_weight": "3e-2", "iterations": 600, "seed": 10}}, set()),
    ({"train": {"generator_learning_rate": 0.0008}}, set()),
]


@pytest.mark.parametrize(("overrides", "stages"), TABLE, ids=[str(row[0]) for row in TABLE])
def test_edit_changes_the_digests_of_exactly_these_stages(overrides: dict[str, Any], stages: set[str]):
    assert changed(overrides) == stages


def test_edit_of_a_runs_file_changes_that_run_and_its_children(tmp_path: Path):
    for part in ("presets", "runs"):
        shutil.copytree(FOLDER / part, tmp_path / part)
    path = tmp_path / "runs" / "noreg_ttur.yaml"
    path.write_text(path.read_text() + "# a comment\n")
    assert digits(tmp_path) == BEFORE, "a comment runs nothing"
    path.write_text(path.read_text().replace("train: {", "train: {weight_decay: 0.02, "))
    after = digits(tmp_path)
    # dmd extends noreg, which extends noreg_ttur; dmd2_long starts from its networks.
    assert {name for name in BEFORE if BEFORE[name] != after[name]} == of_runs("noreg_ttur", "dmd", "dmd2_long")


def test_digest_covers_version_and_upstream_but_not_the_name(monkeypatch: pytest.MonkeyPatch):
    plan = Plan(FOLDER, "digits")
    train = plan.run("dmd2").train

    def spec(name: str = "dmd2", **upstream: Spec) -> Spec:
        return Spec.of("train", name, upstream, train=train)

    assert spec().digest == spec("other name").digest
    assert spec(teacher=plan.teacher).digest != spec().digest
    assert spec(teacher=plan.teacher).digest != spec(teacher=plan.shards).digest
    before = spec().digest
    monkeypatch.setitem(VERSIONS, "train", VERSIONS["train"] + 1)
    assert spec().digest != before


def test_file_is_known_by_its_checksum_and_else_by_its_place():
    def imported(path: str, sha256: str | None) -> dict[str, Any]:
        return {"teacher": {"training": None, "weights": {"path": path, "sha256": sha256}}}

    def at(path: str, sha256: str | None) -> dict[str, str]:
        return digits(overrides=imported(path, sha256))

    assert at("a.pkl", "0" * 64) == at("b.pkl", "0" * 64)
    assert at("a.pkl", "0" * 64)["teacher"] != at("a.pkl", "1" * 64)["teacher"]
    assert at("a.pkl", None)["teacher"] != at("b.pkl", None)["teacher"]
    assert at("a.pkl", None)["train dmd2"] != at("b.pkl", None)["train dmd2"]
    assert "a.pkl" not in Plan(FOLDER, "digits", imported("a.pkl", "0" * 64)).train("dmd2").to_json()


def test_canonical_string_says_every_default_and_has_no_white_space():
    text = Plan(FOLDER, "digits").train("dmd2").to_json()
    assert '"grad_clip":10.0' in text
    assert " " not in text
    assert "\n" not in text


def test_where_the_data_lies_and_how_much_of_it_may_be_unreadable_is_in_no_parameter():
    """Snakemake compares the strings: a moved data set would make, and so train, everything again."""
    plans = [Plan(FOLDER, "digits", {"data": data}) for data in ({}, {"path": "elsewhere", "max_unreadable": 7})]
    for stage in ("shards", "latents", "features", "reference", "teacher", "pairs"):
        assert getattr(plans[0], stage).to_json() == getattr(plans[1], stage).to_json()
    assert plans[0].train("dmd2").to_json() == plans[1].train("dmd2").to_json()


def test_released_student_is_measured_anew_for_no_key_of_training():
    def of_released(train: dict[str, Any]) -> set[str]:
        plan = Plan(FOLDER, "imagenet64", {"train": train})
        entry = "released_dmd2/student"
        return {plan.train("released_dmd2").digest, plan.sample(entry).digest, plan.metrics(entry).digest}

    before = of_released({})
    assert of_released({"seed": 1, "iterations": 100_000, "ema_decay": 0.5}) == before
    assert of_released({"num_steps": 2}) != before
