"""Imported models with a network, prediction and scheduler of their own, against stock pipelines of diffusers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from tiny_pipelines import RESOLUTION, UNETS, tiny_data, tiny_pipeline, tiny_teacher, write_pipeline
from torch import Tensor

from dmd2.config import OwnNetwork, Sampler, StudentWeights
from dmd2.errors import UserError
from dmd2.lineage.spec import Spec
from dmd2.method.denoiser import Teacher
from dmd2.method.schedulers import make_scheduler, num_passes, sample_with
from dmd2.stages import imports
from dmd2.stages.sample import scheduler_of
from dmd2.teachers import load_teacher
from dmd2.teachers.predictions import guidance_embedding

PROMPTS = ["a cat", "a three left of a seven", "red photo of a dog"]
TRAILING = {"timestep_spacing": "trailing"}
LCM = {"time_cond_proj_dim": 8}
CASES: dict[str, tuple[str, dict[str, Any], Any, dict[str, Any], int, dict[str, Any]]] = {
    "lcm, 1 step": ("sdxl", LCM, LCMScheduler, {}, 1, {"network": LCM, "embedded_guidance": 0.0}),
    "lcm, 4 steps": ("sdxl", LCM, LCMScheduler, {}, 4, {"network": LCM, "embedded_guidance": 0.0}),
    "turbo, 1 step": ("sdxl", {}, EulerAncestralDiscreteScheduler, TRAILING, 1, {"time_ids_size": 8}),
    "turbo, 4 steps": ("sdxl", {}, EulerAncestralDiscreteScheduler, TRAILING, 4, {"time_ids_size": 8}),
    "lightning, 1 step": ("sdxl", {}, EulerDiscreteScheduler, TRAILING, 1, {"prediction": "sample"}),
    "lightning, 4 steps": ("sdxl", {}, EulerDiscreteScheduler, TRAILING, 4, {}),
    "lcm-lora, 4 steps": ("sd15", {}, LCMScheduler, {}, 4, {}),
}


def stock(kind: str, changes: dict[str, Any]) -> Any:
    """A stock pipeline with a network that differs from the tiny teacher's in its weights and in `changes`."""
    pipe = tiny_pipeline(kind, seed=5)
    torch.manual_seed(6)
    pipe.unet = UNet2DConditionModel(**{**UNETS[kind], **changes})
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def imported(kind: str, pipe: Any, own: dict[str, Any], folder: Path) -> Teacher:
    """The same network through the import: its weight file as a run's, the components of the teacher."""
    components = write_pipeline(kind, folder / "model", seed=5)
    save_file(pipe.unet.state_dict(), folder / "weights.safetensors")
    teacher = tiny_teacher(kind).model_copy(update={"own": OwnNetwork.model_validate(own)})
    weights = StudentWeights(path=str(folder / "weights.safetensors"))
    spec = Spec.of("import", "baseline", data=tiny_data(), teacher=teacher, weights=weights)
    imports.student(spec, folder / "generator.safetensors", None)
    return load_teacher(teacher, tiny_data(), folder / "generator.safetensors", components=components)


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]


@pytest.mark.parametrize("name", CASES)
def test_imported_models_sample_as_stock_pipelines(name: str, tmp_path: Path) -> None:
    kind, changes, scheduler, options, steps, own = CASES[name]
    pipe = stock(kind, changes)
    teacher = imported(kind, pipe, own, tmp_path)
    predicts = own.get("prediction", "epsilon")
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **options, prediction_type=predicts)
    noise = torch.randn(len(PROMPTS), 4, 8, 8, generator=torch.Generator().manual_seed(1))
    size = own.get("time_ids_size", RESOLUTION)
    sizes = {"original_size": (size, size), "target_size": (size, size)} if kind == "sdxl" else {}
    given = {"height": RESOLUTION, "width": RESOLUTION, "num_inference_steps": steps, "guidance_scale": 0.0, **sizes}
    wanted = pipe(PROMPTS, latents=noise, generator=generators(), output_type="latent", **given).images
    sampler = Sampler(kind="diffusers", scheduler=scheduler.__name__, options=options or None, num_steps=steps)
    made = scheduler_of(sampler, teacher)
    cond = teacher.conditioner.embed(teacher.conditioner.tokenize(PROMPTS))
    found = sample_with(made, teacher.denoiser, teacher.grid, cond, noise, rngs=generators())
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3 * float(wanted.abs().max()))
    assert num_passes(made, 1.0) == steps


@pytest.mark.parametrize("name", ["lcm, 1 step", "turbo, 1 step", "lightning, 1 step"])
def test_each_difference_changes_the_output(name: str, tmp_path: Path) -> None:
    """Without these keys the comparison above would fail."""
    kind, changes, _, _, _, own = CASES[name]
    teacher = imported(kind, stock(kind, changes), own, tmp_path)
    other = {"embedded_guidance": 7.5} if "embedded_guidance" in own else {"time_ids_size": 64, "prediction": "epsilon"}
    changed = tiny_teacher(kind).model_copy(update={"own": OwnNetwork.model_validate({**own, **other})})
    second = load_teacher(changed, tiny_data(), tmp_path / "generator.safetensors", components=tmp_path / "model")

    def output(model: Teacher) -> Tensor:
        cond = model.conditioner.embed(model.conditioner.tokenize(PROMPTS))
        x = 14 * torch.randn(len(PROMPTS), 4, 8, 8, generator=torch.Generator().manual_seed(1))
        return model.denoiser(x, torch.full((len(PROMPTS),), 14.0), cond)

    one, two = output(teacher), output(second)
    assert (one - two).abs().max() > 2e-2 * one.abs().max()


def test_guidance_embedding_is_that_of_diffusers() -> None:
    pipe = tiny_pipeline("sdxl")
    for width in (8, 256, 9):
        wanted = pipe.get_guidance_scale_embedding(torch.tensor([-1.0]), embedding_dim=width)
        torch.testing.assert_close(guidance_embedding(0.0, width), wanted, rtol=1e-4, atol=1e-4)


def test_default_timesteps_of_lcm_are_those_of_its_training() -> None:
    grid = load_teacher(tiny_teacher("sd15"), tiny_data()).grid
    alpha_bar = 1 / (1 + grid.sigmas.double().square())
    betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    assert make_scheduler("LCMScheduler", 4, betas).timesteps.tolist() == [999, 759, 499, 259]
    assert make_scheduler("LCMScheduler", 1, betas).timesteps.tolist() == [999]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"network": LCM}, r"time_cond_proj_dim: 8 is only supported of an imported run.*own.embedded_guidance"),
        ({"embedded_guidance": 0.0}, "own.embedded_guidance: the network has no time_cond_proj_dim"),
        ({"network": {"time_cond_proj": 8}}, "no key 'time_cond_proj'.*did you mean 'time_cond_proj_dim'"),
    ],
)
def test_unsuitable_differences_are_refused(own: dict[str, Any], message: str) -> None:
    teacher = tiny_teacher("sdxl").model_copy(update={"own": OwnNetwork.model_validate(own)})
    with pytest.raises(UserError, match=message):
        load_teacher(teacher, tiny_data())
