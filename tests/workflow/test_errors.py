"""A mistake in the configuration stops the workflow before its first job, in one line with the remedy."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkout import REPOSITORY, Checkout

from dmd2.errors import UserError
from dmd2.report.targets import Targets

RUN, TABLE = "runs/gan.yaml", "tables/table3.yaml"
ROW = "measure: noreg_ttur/student}"

KEYS = {
    "unknown section": ({"trian": {"iterations": 5}}, "unknown key `trian`; did you mean 'train'?"),
    "unknown option": ({"prest": "smoke"}, "unknown key `prest`; did you mean 'preset'?"),
    "unknown key": ({"train": {"iteratoins": 5}}, "unknown key `train.iteratoins`; did you mean 'iterations'?"),
    "unknown key of a run": (
        {"runs": {"gan": {"seeds": 5}}},
        "run gan on preset smoke: unknown key `seeds`; did you mean",
    ),
    "adjusts no run": ({"runs": {"gann": {"seed": 5}}}, "`runs.gann`: "),
    "wrong type": ({"train": {"batch_size": "many"}}, "`train.batch_size` is 'many': input should be a valid integer"),
    "text for a section": (
        {"train": "{seed:"},
        "`train` is '{seed:': input should be a mapping of keys to values, such as {key: value}",
    ),
    "long value": ({"train": {"batch_size": "9" * 2000 + "x"}}, "`train.batch_size` is '" + "9" * 96 + "...: input"),
    "out of range": (
        {"evaluation": {"num_samples": 0}},
        "`evaluation.num_samples` is 0: input should be greater than 0",
    ),
    "half a GAN": ({"train": {"gan_critic_weight": 0}}, "gan_critic_weight must both be 0 or both be positive"),
    "two origins": ({"teacher": {"weights": {"path": "x"}}}, "teacher: set `training` or `weights`, not both"),
    "unknown sampler": ({"pairs": {"sampler": "odd"}}, "pairs.sampler: no sampler 'odd'; known: ode, sde, student"),
    "beyond the teacher": (
        {"train": {"matching_levels": [20, 1000]}},
        "matching_levels: 1000 is beyond the teacher's last level 999",
    ),
    "contradiction in a run": ({"runs": {"noreg": {"matching_weight": 0}}}, "nothing trains the generator"),
    "starts from itself": ({"runs": {"dmd2": {"init_run": "dmd2"}}}, "init_run is a cycle: dmd2 -> dmd2"),
    "starts from no run": ({"runs": {"dmd2": {"init_run": "noreg_tur"}}}, "did you mean 'noreg_ttur'?"),
}
FILES = {
    "key of a run": (
        RUN,
        "matching_weight",
        "maching_weight",
        "unknown key `maching_weight`; did you mean 'matching_weight'?",
    ),
    "parent of a run": (RUN, "extends: dmd2", "extends: dmd2s", "runs/dmd2s.yaml: no such file; did you mean 'dmd2'?"),
    "section of a run": (RUN, "train:", "trian:", "run gan: unknown key `trian`; did you mean 'train'?"),
    "not YAML": (RUN, "train: {", "train: {{", "runs/gan.yaml: not valid YAML"),
    "model of a row": (TABLE, ROW, "measure: dmd3/student}", "entry dmd3/student: "),
    "sampler of a row": (TABLE, ROW, "measure: dmd2/stdent}", "entry dmd2/stdent: no sampler 'stdent' in preset smoke"),
    "wrong sampler": (
        TABLE,
        ROW,
        "measure: teacher/student}",
        "entry teacher/student: teacher needs a sampler of a teacher",
    ),
    "key of a row": (TABLE, ROW, "mesure: dmd2/student}", "unknown key `rows.2.mesure`; did you mean 'measure'?"),
    "id of a row": (TABLE, "id: t3.full", "id: t3.noreg", "row id 't3.noreg' is listed twice"),
}


def complaint(folder: Path, overlay: dict[str, Any]) -> str:
    """What planning every row of every table says."""
    with pytest.raises(UserError) as caught:
        Targets(folder, {"preset": "smoke", **overlay})
    return str(caught.value)


@pytest.mark.parametrize(("overlay", "words"), KEYS.values(), ids=KEYS.keys())
def test_mistake_in_the_users_keys_is_reported_in_one_line(overlay: dict[str, Any], words: str):
    said = complaint(REPOSITORY / "workflow", overlay)
    assert words in said
    assert "\n" not in said


@pytest.mark.parametrize(("path", "old", "new", "words"), FILES.values(), ids=FILES.keys())
def test_mistake_in_a_file_is_reported_in_one_line(tmp_path: Path, path: str, old: str, new: str, words: str):
    folder = shutil.copytree(REPOSITORY / "workflow", tmp_path / "workflow")
    text = (folder / path).read_text()
    assert old in text
    (folder / path).write_text(text.replace(old, new))
    said = complaint(folder, {})
    assert words in said
    assert "\n" not in said


def test_every_mistake_of_a_file_is_reported_at_once():
    said = complaint(REPOSITORY / "workflow", {"train": {"iteratoins": 5}, "features": {"epochs": -1}})
    assert [line.partition(": ")[0] for line in said.splitlines()] == ["preset smoke", "preset smoke"]
    assert "`train.iteratoins`" in said
    assert "`features.epochs` is -1: input should be greater than 0" in said


def refuse(checkout: Checkout, words: str, **options: Any) -> None:
    """Asserts that a real run fails in one line with `words`, and that it started nothing."""
    done = checkout.snakemake("--cores", "1", **options)
    assert done.returncode == 1, done.stdout
    last = done.stdout.splitlines()[-1]
    assert last.startswith("error: "), done.stdout
    assert words in last
    assert done.stdout.count(words) == 1
    assert "Traceback" not in done.stdout
    for folder in ("data", "results", "logs", "state"):
        assert not (checkout / folder).exists(), f"a job was started: {folder}/ is there"


@pytest.mark.parametrize("name", ["unknown section", "half a GAN", "contradiction in a run"])
def test_mistake_in_the_users_keys_stops_snakemake_before_any_job(fresh: Checkout, name: str):
    overlay, words = KEYS[name]
    refuse(fresh, words, overlay=overlay)


@pytest.mark.parametrize("name", ["key of a run", "model of a row", "key of a row"])
def test_mistake_in_a_file_stops_snakemake_before_any_job(fresh: Checkout, name: str):
    path, old, new, words = FILES[name]
    with fresh.edited(f"workflow/{path}", old, new):
        refuse(fresh, words)


def test_mistake_that_only_a_job_finds_is_reported_in_one_line(fresh: Checkout):
    """In a function of an input, and in one of a resource: planning a target that no table reads."""
    done = fresh.snakemake("results/smoke/dmd2/nosuch/metrics.json", "-n")
    assert done.returncode == 1, done.stdout
    assert done.stdout.splitlines()[-1].startswith("error: entry dmd2/nosuch: no sampler 'nosuch'"), done.stdout


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("results/tabel1.csv", "there is no table tabel1; did you mean 'table1'?"),
        ("results/smok/gan/metrics.json", "there is no preset smok; did you mean 'smoke'?"),
        ("results/smoke/gann_seed3/generator.safetensors", "there is no run gann; did you mean 'gan'?"),
        ("results/smoke/gan_seed3/generator.safetensors", None),
        ("results/smoke/features/extractor.json", None),
        ("results/smoke/config.yaml", None),
        ("data/smoke/shards/manifest.json", None),
    ],
)
def test_target_of_an_unknown_name_is_refused(target: str, words: str | None):
    targets = Targets(REPOSITORY / "workflow", {})
    if words is None:
        targets.check_requested([target])
        return
    with pytest.raises(UserError, match=f"^{re.escape(f'{target}: {words}')}$"):
        targets.check_requested(["results/table1.csv", target])


def test_target_of_an_unknown_run_stops_snakemake_in_one_line(fresh: Checkout):
    done = fresh.snakemake("results/smoke/gann/generator.safetensors", "-n")
    assert done.returncode == 1, done.stdout
    assert done.stdout.splitlines()[-1].startswith("error: results/smoke/gann/generator.safetensors: there is no run")
    assert "MissingRule" not in done.stdout


def test_too_few_devices_are_reported_in_one_line(fresh: Checkout):
    done = fresh.snakemake("--cores", "1", "--resources", "gpu=1", overlay={"gpus": 2})
    assert done.returncode == 1, done.stdout
    (line,) = [line for line in done.stdout.splitlines() if "gpus is 2" in line]
    assert line.startswith("error: preset smoke: gpus is 2, but 1 can be used here; say ")
    assert "Traceback" not in done.stdout
    assert "common.smk" not in done.stdout.partition(line)[2]


def test_unknown_preset_stops_snakemake_before_any_job(fresh: Checkout):
    refuse(fresh, "smok.yaml: no such file; did you mean 'smoke'?", config="preset=smok")


def test_planning_imports_neither_torch_nor_triton(fresh: Checkout, tmp_path: Path):
    for name in ("torch", "triton", "torchvision"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name} was imported while planning')\n")
    done = fresh.snakemake_started_anew("-n", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stdout
    assert "rule train:" in done.stdout


def test_gpu_job_gets_a_gpu_under_the_default_profile(fresh: Checkout):
    done = fresh.snakemake("results/smoke/gan/generator.safetensors", "-n", overlay={"gpus": 1})
    resources = [line for line in done.stdout.splitlines() if line.startswith("    resources:") and "state=" in line]
    assert len(resources) == 2, done.stdout  # teacher and train
    assert all("gpu=1" in line for line in resources)
