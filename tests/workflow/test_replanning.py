"""Which edit runs which jobs again: every expected set is written out from the paper's tables, not from the plan."""

import os
import random
from pathlib import Path

import pytest
import yaml
from checkout import Checkout

ABLATIONS = ("noreg", "noreg_ttur", "gan", "gan_ttur")
ABLATION = "dmd2/ablation"  # a snapshot of the run in table 1
TABLES = {"dmd": (1, 3), "dmd2": (1,), "dmd2_long": (1,), **dict.fromkeys(ABLATIONS, (3,)), "teacher": (1,)}
"""The tables of the paper in which a model stands."""
RUNS = set(TABLES) - {"teacher"}
SIDE_BY_SIDE = {"teacher/ode", "dmd2/student", "noreg/student"}
STUDENTS = {f"{run}/student" for run in RUNS}
ENTRIES = STUDENTS | {"teacher/ode", "teacher/sde", ABLATION}


def tables_with(*entries: str) -> set[str]:
    numbers = {number for entry in entries for number in ((3,) if entry == ABLATION else TABLES[entry.split("/")[0]])}
    return {f"table table{number}" for number in numbers}


def sampled(*entries: str) -> set[str]:
    """The jobs that follow new weights or a new sampler of the entries."""
    jobs = {f"{rule} {entry}" for entry in entries for rule in ("sample", "metrics", "grid")}
    return jobs | tables_with(*entries) | ({"compare"} if SIDE_BY_SIDE & set(entries) else set())


def trained(*runs: str) -> set[str]:
    """The jobs that follow a change of the runs' training."""
    own = {f"{rule} {run}" for run in runs for rule in ("train", "curve")} | {"curves"}
    entries = [f"{run}/student" for run in runs]
    if "dmd2" in runs:
        own, entries = own | {f"select {ABLATION}"}, [*entries, ABLATION]
    return own | sampled(*entries)


MEASURED = {f"metrics {entry}" for entry in ENTRIES} | {f"curve {run}" for run in RUNS} | {"curves", "floor"}
EVERYTHING = (
    {"shards", "latents", "teacher", "pairs", "features", "reference", "floor", "real_grid", "configuration"}
    | {"table table1", "table table3"}  # the others quote the paper alone
    | trained(*RUNS)
    | sampled(*ENTRIES)
)
KEYS = {
    "data.shard_size": ({"data": {"shard_size": 200}}, EVERYTHING),
    "teacher.training": (
        {"teacher": {"training": {"iterations": 101}}},
        {"teacher", "pairs"} | trained(*RUNS) | sampled(*ENTRIES),
    ),
    "features.epochs": (
        {"features": {"epochs": 2}},
        {"features", "reference"} | MEASURED | tables_with(*ENTRIES),
    ),
    "samplers.ode": (
        {"samplers": {"ode": {"num_steps": 5}}},
        {"pairs"} | trained("dmd") | sampled("teacher/ode"),
    ),
    "evaluation.num_samples": (
        {"evaluation": {"num_samples": 400}},
        sampled(*ENTRIES) | {"floor"},
    ),
    "samples of the curve": (
        {"evaluation": {"curve_samples": 400}},
        {f"curve {run}" for run in RUNS} | {"curves"},
    ),
    "weights of the GAN": (
        {"train": {"gan_generator_weight": 0.02, "gan_critic_weight": 0.02}},
        trained("dmd2", "dmd2_long", "gan", "gan_ttur"),
    ),
    "a run that another starts from": ({"runs": {"noreg_ttur": {"seed": 11}}}, trained("noreg_ttur", "dmd2_long")),
    "execution and words": (
        {"runtime": {"log_every": 7, "sample_batch_size": 64}, "gpus": 1, "description": "The same."},
        set(),
    ),
}


@pytest.mark.parametrize(("overlay", "expected"), KEYS.values(), ids=KEYS.keys())
def test_key_plans_exactly_the_jobs_that_read_it(finished: Checkout, overlay: dict, expected: set[str]):
    # The configuration that the report shows is written anew after each of these edits.
    assert finished.planned(overlay=overlay) == expected | {"configuration"}


def test_finished_run_has_nothing_to_do(finished: Checkout):
    assert finished.planned() == set()


def test_time_stamps_start_nothing(finished: Checkout, tmp_path: Path):
    checkout = finished.copy(tmp_path / "dmd2")
    files = [path for path in checkout.folder.rglob("*") if path.is_file() and ".git/" not in str(path)]
    assert checkout / "workflow/launch.sh" in files
    assert checkout / "data/smoke/shards/manifest.json" in files
    assert (checkout / "results/smoke/noreg_ttur/networks.safetensors").stat().st_size > 1_000_000
    order = random.Random(0)
    for path in files:
        os.utime(path, times=(stamp := 1.9e9 + order.randrange(10**6), stamp))
    assert checkout.planned() == set()


def test_moved_checkout_has_nothing_to_do(finished: Checkout, tmp_path: Path):
    assert finished.copy(tmp_path / "elsewhere" / "project").planned() == set()


def test_order_of_keys_starts_nothing(finished: Checkout, tmp_path: Path):
    checkout = finished.copy(tmp_path / "dmd2")
    for path in [*(checkout / "workflow/presets").glob("*.yaml"), *(checkout / "workflow/runs").glob("*.yaml")]:
        path.write_text(yaml.safe_dump(backwards(yaml.safe_load(path.read_text())), sort_keys=False))
    assert checkout.planned() == set()


def backwards(value: object) -> object:
    """Mappings with their keys in the opposite order, at every level."""
    return {key: backwards(value[key]) for key in reversed(value)} if isinstance(value, dict) else value


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("workflow/rules/train.smk", " --state {resources.state:q}", "   --state   {resources.state:q}"),
        (
            "workflow/rules/train.smk",
            'bash "$DMD2_LAUNCH" {resources.processes:q}',
            'nice bash "$DMD2_LAUNCH" {resources.processes:q}',
        ),
        ("workflow/launch.sh", "set -euo pipefail\n", "set -euo pipefail\n\n# A remark.\n"),
        ("workflow/runs/dmd2.yaml", "description:", "# A remark.\ndescription:   "),
    ],
    ids=["white space in a rule", "command of a rule", "launcher", "remark in a run"],
)
def test_wording_starts_nothing(finished: Checkout, path: str, old: str, new: str):
    with finished.edited(path, old, new):
        assert finished.planned() == set()


def test_edited_run_plans_its_own_jobs(finished: Checkout):
    with finished.edited("workflow/runs/gan.yaml", "critic_steps_per_generator: 1", "critic_steps_per_generator: 2"):
        assert finished.planned() == trained("gan") | {"configuration"}


def test_edited_run_plans_its_heirs_and_those_that_start_from_it(finished: Checkout):
    with finished.edited("workflow/runs/noreg_ttur.yaml", "train: {", "train: {seed: 11, "):
        assert finished.planned() == trained("noreg_ttur", "noreg", "dmd", "dmd2_long") | {"configuration"}


def test_edited_table_plans_that_table(finished: Checkout):
    with finished.edited("workflow/tables/table1.yaml", "method: BigGAN-deep", "method: BigGAN deep"):
        assert finished.planned() == {"table table1"}


LAST = "  - {id: t3.floor,"


def test_new_row_is_one_line(finished: Checkout):
    row = "  - {id: t3.sde, group: Reference, method: Teacher, measure: teacher/sde}\n"
    with finished.edited("workflow/tables/table3.yaml", LAST, row + LAST):
        assert finished.planned() == {"table table3"}


def test_new_run_is_three_lines(finished: Checkout):
    run = "extends: dmd2\ndescription: Another seed.\ntrain: {seed: 11}\n"
    row = "  - {id: t3.seed, group: Distribution matching, method: Another seed, measure: other_seed/student}\n"
    with (
        finished.added("workflow/runs/other_seed.yaml", run),
        finished.edited("workflow/tables/table3.yaml", LAST, row + LAST),
    ):
        jobs = {f"{rule} other_seed" for rule in ("train", "curve")}
        jobs |= {f"{rule} other_seed/student" for rule in ("sample", "metrics", "grid")}
        assert finished.planned() == jobs | {"curves", "table table3", "configuration"}
