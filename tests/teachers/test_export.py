"""Exported students in stock pipelines of another process without network: the same images as ours."""

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pipelines import KINDS, tiny_data, tiny_teacher, write_pipeline
from torch import Tensor

from dmd2 import config
from dmd2.errors import UserError
from dmd2.lineage.spec import Spec
from dmd2.method import sampling
from dmd2.method.denoiser import Teacher
from dmd2.stages.sample import from_student
from dmd2.teachers import load_teacher
from dmd2.teachers.export import LORA_FILE, export_adapter, export_network, student_scheduler
from dmd2.teachers.lora import Role, roles
from dmd2.training.rng import SampleNoise

SCRIPT = Path(__file__).parents[1] / "stock_pipeline.py"
PROMPTS = ["a red cat", "three left of a seven", "dog!"]
LEVELS = (999, 749, 499, 249)
EARLY = (399,)
LORA = config.LoRA(rank=4, alpha=2.0)


def stirred(module: torch.nn.Module, scale: float) -> None:
    """Changes weights, as training does: a student is not its teacher."""
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=scale)


def ours(teacher: Teacher, denoiser: Any, scheduler: Any, steps: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Latents by the sampler of evaluation and `dmd2 generate`, and by the few-step sampler of training."""
    cond = teacher.conditioner.embed(teacher.conditioner.tokenize(PROMPTS))
    noise, again = (SampleNoise(seed, range(len(PROMPTS)), teacher.sample_shape) for _ in range(2))
    levels = copy.deepcopy(scheduler)
    levels.set_timesteps(steps)
    train = config.Train(num_steps=steps, student_levels=tuple(levels.timesteps.tolist()))
    spec = Spec.of("sample", "run/student", teacher=tiny_teacher("sd15"), train=train)
    deployed = from_student(spec, dataclasses.replace(teacher, denoiser=denoiser), cond, noise)
    return deployed, sampling.few_step(denoiser, cond, teacher.grid.student_steps(steps, train.student_levels), again)


class Case(NamedTuple):
    """A job for stock diffusers, and our latents for it."""

    job: dict[str, Any]
    expected: Tensor
    few_step: Tensor
    teacher: Teacher


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """All exports of both kinds of pipeline, sampled in one process by stock diffusers."""
    found: dict[str, Case] = {}
    for kind in KINDS:
        home = tmp_path_factory.mktemp(kind)
        source = write_pipeline(kind, home / "base")
        teacher = load_teacher(tiny_teacher(kind, source), tiny_data())
        student = teacher.copy_network().eval()
        stirred(student, 0.02)
        schedulers = {
            name: student_scheduler(tiny_teacher(kind), levels) for name, levels in (("4", LEVELS), ("1", EARLY))
        }
        export_network(home / "whole", student, schedulers["4"], components=source, facts={"run": "dmd2"})
        export_network(home / "early", student, schedulers["1"])
        adapted = roles(copy.deepcopy(teacher.denoiser), {"student": LORA})["student"]
        stirred(adapted, 0.2)
        export_adapter(home / "lora", adapted, schedulers["4"], facts={"base model": "owner/name"})
        copy_without_metadata(home / "lora", home / "bare")
        jobs: dict[str, tuple[Any, Any, int, dict[str, Any]]] = {
            "whole": (student, schedulers["4"], 4, {"pipeline": home / "whole"}),
            "two": (student, schedulers["4"], 2, {"pipeline": home / "whole"}),
            "one": (student, schedulers["4"], 1, {"pipeline": home / "whole"}),
            "early": (student, schedulers["1"], 1, dict.fromkeys(("unet", "scheduler"), home / "early")),
            "lora": (adapted, schedulers["4"], 4, dict.fromkeys(("lora", "scheduler"), home / "lora")),
            "bare": (adapted, schedulers["4"], 4, dict.fromkeys(("lora", "scheduler"), home / "bare")),
        }
        for name, (denoiser, scheduler, steps, keys) in jobs.items():
            seeds = [rng.initial_seed() for rng in SampleNoise(3, range(len(PROMPTS)), (1,)).rngs]
            job = {"pipeline": str(source), "prompts": PROMPTS, "seeds": seeds, "steps": steps}
            job |= {key: str(value) for key, value in keys.items()} | {"out": str(home / f"{name}.safetensors")}
            found[f"{kind}-{name}"] = Case(job, *ours(teacher, denoiser, scheduler, steps), teacher)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, SCRIPT, json.dumps([case.job for case in found.values()])],
        env=environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return found


def copy_without_metadata(source: Path, target: Path) -> None:
    """The adapters as they are saved without `unet_lora_adapter_metadata`: trap 4."""
    shutil.copytree(source, target)
    save_file(load_file(source / LORA_FILE), target / LORA_FILE, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["whole", "two", "one", "early", "lora"])
def test_stock_pipelines_give_our_samples_bit_for_bit(cases: dict[str, Case], kind: str, name: str) -> None:
    case = cases[f"{kind}-{name}"]
    found = load_file(case.job["out"])
    assert found["latents"].abs().max() > 0.1
    assert torch.equal(found["latents"], case.expected)
    decoded = case.teacher.codec.decode(case.expected)
    difference = (found["images"].int() - torch.from_numpy(decoded).int()).abs()
    assert difference.max() <= 1  # a tie may round the other way
    assert difference.float().mean() < 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["whole", "two", "one", "early", "lora"])
def test_the_few_step_sampler_agrees_up_to_rounding(cases: dict[str, Case], kind: str, name: str) -> None:
    case = cases[f"{kind}-{name}"]
    scale = case.expected.abs().max()
    assert (case.few_step - case.expected).abs().max() < 2e-4 * scale


@pytest.mark.parametrize("kind", KINDS)
def test_trap_4_adapters_without_alpha_have_another_scale(cases: dict[str, Case], kind: str) -> None:
    case = cases[f"{kind}-bare"]
    found = load_file(case.job["out"])["latents"]
    assert (found - case.expected).abs().max() > 1e-2 * case.expected.abs().max()


def test_steps_and_first_level_change_the_samples(cases: dict[str, Case]) -> None:
    latents = [cases[f"sd15-{name}"].expected for name in ("whole", "two", "one", "early")]
    for index, first in enumerate(latents):
        for second in latents[index + 1 :]:
            assert not torch.allclose(first, second)


def test_exports_hold_what_their_card_says(cases: dict[str, Case]) -> None:
    home = Path(cases["sdxl-whole"].job["pipeline"])
    card = (home / "README.md").read_text()
    assert "num_inference_steps=4, guidance_scale=0" in card
    assert "[999, 749, 499, 249]" in card
    assert "- run: dmd2" in card
    assert not [path for path in home.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    early = Path(cases["sdxl-early"].job["unet"])
    assert sorted(path.name for path in early.iterdir()) == ["README.md", "scheduler", "unet"]
    assert "[399]" in (early / "README.md").read_text()
    lora = Path(cases["sdxl-lora"].job["lora"])
    assert "base_model: owner/name" in (lora / "README.md").read_text()
    with safe_open(lora / LORA_FILE, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (4, 2.0)


def test_an_export_replaces_what_was_there(tmp_path: Path) -> None:
    teacher = load_teacher(tiny_teacher("sd15"), tiny_data())
    out, scheduler = tmp_path / "out", student_scheduler(tiny_teacher("sd15"), LEVELS)
    (out / "vae").mkdir(parents=True)
    export_network(out, teacher.denoiser, scheduler)
    assert not (out / "vae").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UserError, match="vae"):  # the components are missing
        export_network(out, teacher.denoiser, scheduler, components=tmp_path / "nowhere")
    assert (out / "unet").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("levels", "wanted"),
    [
        (LEVELS, {4: list(LEVELS), 2: [999, 499], 1: [999]}),
        ((999, 499), {2: [999, 499], 1: [999]}),
        ((799, 399), {2: [799, 399]}),
        (EARLY, {1: [399]}),
    ],
)
def test_num_inference_steps_alone_gives_the_levels(levels: tuple[int, ...], wanted: dict[int, list[int]]) -> None:
    scheduler = student_scheduler(tiny_teacher("sd15"), levels)
    for num, expected in wanted.items():
        scheduler.set_timesteps(num)
        assert scheduler.timesteps.tolist() == expected


def test_the_schedulers_noise_is_the_teachers() -> None:
    scheduler, grid = (
        student_scheduler(tiny_teacher("sd15"), EARLY),
        load_teacher(tiny_teacher("sd15"), tiny_data()).grid,
    )
    abar = scheduler.alphas_cumprod.double()
    torch.testing.assert_close(((1 - abar) / abar).sqrt().float(), grid.sigmas[:400], rtol=2e-5, atol=0)


def test_students_without_a_stock_scheduler_are_refused() -> None:
    with pytest.raises(UserError, match=r"levels \[999, 500\] are not those of LCMScheduler"):
        student_scheduler(tiny_teacher("sd15"), (999, 500))
    with pytest.raises(UserError, match="no flow matching"):
        student_scheduler(tiny_teacher("sd15", prediction="flow"), LEVELS)


def test_a_role_and_its_network_have_the_same_output_function() -> None:
    teacher = load_teacher(tiny_teacher("sd15"), tiny_data())
    role: Role = roles(teacher.denoiser, {"student": LORA})["student"]
    stirred(role, 0.2)
    x, time = torch.randn(1, *teacher.sample_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([399])
    cond = {"text": torch.zeros(1, 8, 16)}
    with role.shared.role("student") as network:
        assert torch.equal(role.output(x, time, cond), network.output(x, time, cond))
    assert not torch.equal(role.output(x, time, cond), role.shared.network.output(x, time, cond))
