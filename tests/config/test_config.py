"""Presets and runs: what loads, what is refused, and in which words."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from dmd2.config import Train
from dmd2.config.reading import load_preset, merge, read_chain, read_yaml
from dmd2.errors import UserError
from dmd2.lineage.plan import Plan

FOLDER = Path(__file__).parents[2] / "workflow"
PRESETS = sorted(path.stem for path in (FOLDER / "presets").glob("*.yaml"))
RUNS = sorted(path.stem for path in (FOLDER / "runs").glob("*.yaml"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the workflow's presets and runs, to be edited."""
    for part in ("presets", "runs"):
        shutil.copytree(FOLDER / part, tmp_path / part)
    return tmp_path


def write(path: Path, content: Any) -> None:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("run", RUNS)
def test_every_run_loads_on_every_preset(preset: str, run: str):
    plan = Plan(FOLDER, preset)
    assert plan.run(run).name == run
    assert re.fullmatch("[0-9a-f]{16}", plan.train(run).digest)
    steps = plan.run(run).train.snapshot_steps()
    assert steps == sorted(set(steps))
    assert steps[-1] == plan.run(run).train.iterations


def test_runs_of_table_3_differ_in_what_the_paper_says():
    plan = Plan(FOLDER, "digits")
    table = {
        "dmd": (True, 1, False, True),
        "noreg": (True, 1, False, False),
        "noreg_ttur": (True, 5, False, False),
        "dmd2": (True, 5, True, False),
        "gan": (False, 1, True, False),
        "gan_ttur": (False, 5, True, False),
    }
    for name, (matching, ratio, gan, regression) in table.items():
        train = plan.run(name).train
        found = train.matching_weight > 0, train.critic_steps_per_generator, train.has_gan, train.regression_weight > 0
        assert found == (matching, ratio, gan, regression), name
    assert plan.run("dmd2_long").train.init_run == "noreg_ttur"


def test_defaults_are_the_released_imagenet_script():
    train = Train()
    assert (train.batch_size, train.iterations, train.critic_steps_per_generator) == (280, 200_000, 5)
    assert (train.generator_learning_rate, train.critic_learning_rate) == (2e-6, 2e-6)
    assert (train.gan_generator_weight, train.gan_critic_weight) == (3e-3, 1e-2)
    assert (train.betas, train.weight_decay, train.grad_clip) == ((0.9, 0.999), 0.01, 10)
    assert (train.matching_levels, train.critic_levels, train.gan_levels) == ((20, 980), (0, 999), (0, 999))
    assert (train.seed, train.ema_decay, train.guidance_scale, train.r1_weight) == (10, 0, 1, 0)
    assert train.warmup_iterations == -(-500 // 7)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"trian": {}}, r"unknown key `trian`; did you mean 'train'\?"),
        ({"data": {"resolutoin": 8}}, r"unknown key `data\.resolutoin`; did you mean 'resolution'\?"),
        ({"teacher": {"sigma_dat": 1}}, r"unknown key `teacher\.sigma_dat`; did you mean 'sigma_data'\?"),
        ({"teacher": {"network": {"num_block": 1}}}, r"`teacher\.network\.num_block`; did you mean 'num_blocks'\?"),
        ({"teacher": {"training": {"iteration": 1}}}, r"`teacher\.training\.iteration`; did you mean 'iterations'\?"),
        ({"samplers": {"sde": {"s_chrun": 1}}}, r"`samplers\.sde\.s_chrun`; did you mean 's_churn'\?"),
        ({"evaluation": {"num_sample": 1}}, r"`evaluation\.num_sample`; did you mean 'num_samples'\?"),
        ({"train": {"gan_generator_wieght": 0}}, r"`train\.gan_generator_wieght`; did you mean 'gan_generator_weight'"),
        ({"runtime": {"log_evry": 5}}, r"`runtime\.log_evry`; did you mean 'log_every'\?"),
        ({"pairs": {"seeds": 1}}, r"`pairs\.seeds`; did you mean 'seed'\?"),
        ({"features": {"epoch": 1}}, r"`features\.epoch`; did you mean 'epochs'\?"),
        ({"runs": {"dmd": {"regresion_weight": 1}}}, r"run dmd .*`regresion_weight`; did you mean 'regression_weight'"),
        ({"runs": {"dmd_2": {"seed": 1}}}, r"dmd_2\.yaml: no such file; did you mean 'dmd2?'\?"),
    ],
)
def test_misspelt_key_is_named_with_a_suggestion(override: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message) as error:
        Plan(FOLDER, "digits", override)
    assert "\n" not in str(error.value)


def test_misspelt_key_of_a_run_is_named_with_run_and_preset(folder: Path):
    write(folder / "runs" / "mine.yaml", {"description": "", "extends": "dmd2", "train": {"ema_decya": 0.5}})
    with pytest.raises(UserError, match=r"run mine on preset digits: .*`ema_decya`; did you mean 'ema_decay'"):
        Plan(folder, "digits").run("mine")
    write(folder / "runs" / "mine.yaml", {"description": "", "extend": "dmd2"})
    with pytest.raises(UserError, match=r"run mine: unknown key `extend`; known: description, own, train, weights"):
        Plan(folder, "digits").run("mine")


def test_every_problem_has_a_line_of_its_own():
    with pytest.raises(UserError) as error:
        load_preset(FOLDER, "digits", {"train": {"batch_size": -1, "seed": "x"}, "gpu": 1})
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("preset digits: ") for line in lines)
    assert "`train.batch_size` is -1: input should be greater than 0" in str(error.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"gan_generator_weight": 0}, "both be 0 or both be positive"),
        ({"gan_critic_weight": 0}, "both be 0 or both be positive"),
        ({"matching_weight": 0, "gan_generator_weight": 0, "gan_critic_weight": 0}, "nothing trains the generator"),
        ({"share_critic_pass": True, "gan_levels": [0, 500]}, "critic_levels and gan_levels to be equal"),
        ({"r1_weight": 1, "gan_generator_weight": 0, "gan_critic_weight": 0}, "r1_weight needs a GAN"),
        ({"num_snapshots": 20, "iterations": 10}, "num_snapshots 20 exceeds iterations 10"),
        ({"matching_levels": [980, 20]}, r"matching_levels must be \[low, high\]"),
        ({"critic_levels": [-1, 20]}, r"critic_levels must be \[low, high\]"),
        ({"gan_levels": [0, 1000]}, "gan_levels: 1000 is beyond the teacher's last level 999"),
        ({"num_steps": 1001}, "num_steps 1001 exceeds the teacher's 1000 levels"),
        ({"seed": -1}, "`train.seed` is -1"),
        ({"seed": 2**32}, "`train.seed` is 4294967296"),
        ({"betas": [0.9, 1.0]}, r"`train\.betas\.1` is 1\.0"),
        ({"guidance_scale": 0.5}, "guidance_scale"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"gan_generator_weight": float("nan")}, "gan_generator_weight"),
        ({"batch_size": 2.5}, "batch_size"),
    ],
)
def test_contradictory_or_impossible_training_key_is_refused(keys: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        load_preset(FOLDER, "digits", {"train": {"share_critic_pass": False, **keys}})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"samplers": {"ode": {"num_steps": None}}}, "samplers.ode: `num_steps` belongs to a teacher"),
        ({"samplers": {"student": {"num_steps": 4}}}, "samplers.student: `num_steps` belongs to a teacher"),
        ({"samplers": {"student": {"s_churn": 4}}}, "samplers.student: `s_churn`.* belong to kind heun"),
        ({"samplers": {"sde": {"s_max": 0.01}}}, "s_max 0.01 is below s_min 0.05"),
        ({"pairs": {"sampler": "odee"}}, "pairs.sampler: no sampler 'odee'; known: ode, sde, student"),
        ({"pairs": {"sampler": "sde"}}, "pairs.sampler: 'sde' is not deterministic"),
        ({"pairs": {"sampler": "student"}}, "pairs.sampler: 'student' is not deterministic"),
        ({"teacher": {"weights": {"path": "x"}}}, "set `training` or `weights`, not both"),
        ({"teacher": {"sigma_min": 90}}, "sigma_min 90.0 must be below sigma_max 80.0"),
        ({"teacher": {"training": None, "weights": {"path": "x", "sha256": "12"}}}, "sha256"),
        ({"gpus": 3}, "batch_size 64 is not divisible by 3 gpus; use 66"),
        ({"data": {"channels": 2}}, "data.channels"),
        ({"data": {"levels": 1}}, "data.levels"),
    ],
)
def test_contradictory_preset_is_refused(override: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        load_preset(FOLDER, "digits", override)


def test_run_that_asks_more_than_the_preset_has_is_refused(folder: Path):
    write(folder / "runs" / "mine.yaml", {"description": "", "extends": "dmd2", "train": {"batch_size": 30}})
    with pytest.raises(UserError, match="run mine on preset digits: batch_size 30 is not divisible by 4 gpus; use 32"):
        Plan(folder, "digits", {"gpus": 4}).run("mine")


WEIGHTS = {"path": "unet.safetensors"}


@pytest.mark.parametrize(
    ("preset", "keys", "message"),
    [
        ("sdxl", {"own": {}}, "run mine: `own` belongs to a run with `weights`"),
        (
            "sdxl", {"weights": {**WEIGHTS, "lora_rank": 4}, "own": {"network": {"act_fn": "gelu"}}},
            "`own.network` does not go with `weights.lora_rank`: adapters have the teacher's network",
        ),
        (
            "sdxl", {"weights": WEIGHTS, "own": {}},
            "entry mine/student: mine needs a sampler of a teacher, but student is few_step",
        ),
        ("digits", {"weights": WEIGHTS, "own": {}}, "run mine on preset digits: `own` belongs to teachers of"),
        (
            "digits", {"weights": {**WEIGHTS, "lora_rank": 4}},
            "`weights.lora_rank` belongs to teachers of kind diffusers, not edm; use another preset",
        ),
    ],
)  # fmt: skip
def test_imported_network_that_does_not_fit_is_refused(preset: str, keys: dict[str, Any], message: str, folder: Path):
    write(folder / "runs" / "mine.yaml", {"description": "", **keys})
    with pytest.raises(UserError, match=message):
        Plan(folder, preset).metrics("mine/student")


def test_difference_of_an_imported_network_is_no_key_of_a_preset():
    with pytest.raises(UserError, match=r"teacher\.own: it belongs to a run with `weights`; move it there"):
        load_preset(FOLDER, "sdxl", {"teacher": {"own": {"prediction": "sample"}}})


def test_numbers_that_yaml_reads_as_strings_are_numbers():
    assert yaml.safe_load("3e-3") == "3e-3", "the reason for this test"
    written = load_preset(FOLDER, "digits", yaml.safe_load("train: {gan_generator_weight: 3e-3}"))
    assert written.train.gan_generator_weight == 0.003
    with pytest.raises(UserError, match="gan_generator_weight` is 'much'"):
        load_preset(FOLDER, "digits", {"train": {"gan_generator_weight": "much"}})


def test_merge_lays_mappings_over_each_other_and_replaces_the_rest():
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 1}
    assert merge(base, {"a": {"c": [3]}, "e": 2}) == {"a": {"b": 1, "c": [3]}, "d": 1, "e": 2}
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": 1}


def test_extends_follows_parents_nearest_first(folder: Path):
    write(folder / "runs" / "a.yaml", {"description": "a", "train": {"seed": 1, "iterations": 50}})
    write(folder / "runs" / "b.yaml", {"extends": "a", "description": "b", "train": {"seed": 2}})
    write(folder / "runs" / "c.yaml", {"extends": "b", "description": "c", "train": {"ema_decay": 0.5}})
    run = Plan(folder, "digits").run("c")
    assert (run.train.seed, run.train.iterations, run.train.ema_decay) == (2, 50, 0.5)
    assert run.description == "c"
    assert run.train.batch_size == 64, "from the preset, for what no file of the run sets"


def test_presets_adjustment_lies_over_the_runs_own_keys(folder: Path):
    write(folder / "runs" / "mine.yaml", {"description": "", "train": {"seed": 1, "ema_decay": 0.25}})
    run = Plan(folder, "digits", {"runs": {"mine": {"seed": 5}}}).run("mine")
    assert (run.train.seed, run.train.ema_decay) == (5, 0.25)


@pytest.mark.parametrize("parents", [["a"], ["b", "a"], ["b", "c", "a"]])
def test_extends_in_a_circle_is_refused(parents: list[str], folder: Path):
    names = ["a", *parents]
    for name, parent in zip(names, parents, strict=False):
        write(folder / "runs" / f"{name}.yaml", {"extends": parent, "description": ""})
    with pytest.raises(UserError, match="`extends` is a cycle: " + " -> ".join(names)):
        read_chain(folder / "runs", "a")


def test_extends_takes_one_existing_name(folder: Path):
    write(folder / "runs" / "a.yaml", {"extends": ["dmd2", "gan"], "description": ""})
    with pytest.raises(UserError, match="`extends` must be one name"):
        read_chain(folder / "runs", "a")
    write(folder / "runs" / "a.yaml", {"extends": "dmd22", "description": ""})
    with pytest.raises(UserError, match=r"dmd22\.yaml: no such file; did you mean 'dmd2'\?"):
        read_chain(folder / "runs", "a")


def test_init_run_in_a_circle_is_refused(folder: Path):
    for name, parent in (("a", "b"), ("b", "c"), ("c", "a")):
        write(folder / "runs" / f"{name}.yaml", {"description": "", "train": {"init_run": parent}})
    with pytest.raises(UserError, match=r"init_run is a cycle: (\w) -> \w -> \w -> \1$"):
        Plan(folder, "digits").run("a")
    write(folder / "runs" / "self.yaml", {"description": "", "train": {"init_run": "self"}})
    with pytest.raises(UserError, match="init_run is a cycle: self -> self"):
        Plan(folder, "digits").run("self")
    write(folder / "runs" / "lost.yaml", {"description": "", "train": {"init_run": "noreg_tur"}})
    with pytest.raises(UserError, match="did you mean 'noreg_ttur'"):
        Plan(folder, "digits").run("lost")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("data: [1, 2", r"bad\.yaml: not valid YAML.*line 1"),
        ("- 1\n- 2\n", r"bad\.yaml: expected a mapping"),
        ("just words", r"bad\.yaml: expected a mapping"),
        ("a: 1\nb: 2\na: 3\n", r"bad\.yaml: not valid YAML: key `a` twice .*line 3"),
    ],
)
def test_file_that_is_no_mapping_is_named_with_its_line(content: str, message: str, tmp_path: Path):
    write(tmp_path / "bad.yaml", content)
    with pytest.raises(UserError, match=message) as error:
        read_yaml(tmp_path / "bad.yaml")
    assert "\n" not in str(error.value)


def test_binary_file_is_named(tmp_path: Path):
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"bad\.yaml: not a text file"):
        read_yaml(tmp_path / "bad.yaml")


@pytest.mark.parametrize("entry", ["teacher/student", "dmd2/ode", "dmd2/nothing", "teacher"])
def test_entry_whose_sampler_does_not_fit_its_model_is_refused(entry: str):
    with pytest.raises(UserError, match=f"entry {entry}"):
        Plan(FOLDER, "digits").sample(entry)


def test_misspelt_choice_of_preset_is_distinguished_from_a_key_of_presets():
    with pytest.raises(UserError, match="unknown key `prest`; did you mean 'preset'"):
        load_preset(FOLDER, "digits", {"prest": "smoke"})
