"""What `dmd2 generate` and `dmd2 export` make of the weights of a run, and what they refuse in one line."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from world import World

from dmd2.commands import planning
from dmd2.errors import UserError
from dmd2.stages.generate import export, generate, images_of, open_run

PROMPT = "a three left of a seven"
ONE: dict[str, Any] = {"num": 1, "seed": 0, "steps": 2, "guidance_scale": 2.0}


def run_alone(results: Path, folder: Path, run: str = "dmd2_1step") -> Path:
    """A copy of a run without its components."""
    shutil.copytree(results / run, folder / run)
    return folder / run


def test_the_passes_are_of_the_run_or_of_the_chosen_sampler(text_results: Path):
    passes = {run: open_run(text_results / run, "cpu", steps=3).passes for run in ("dmd2_1step", "dmd2_4step")}
    assert passes == {"dmd2_1step": 1, "dmd2_4step": 4}
    teacher = text_results / "teacher"
    assert open_run(teacher, "cpu", steps=3).passes == 6, "guided: two passes per step"
    assert open_run(teacher, "cpu", steps=3, guidance_scale=1.0).passes == 3


def test_an_image_is_a_function_of_prompt_seed_and_number(text_results: Path):
    model = open_run(text_results / "dmd2_4step", "cpu")
    both = images_of(model, [PROMPT, PROMPT], 5)
    assert (both.shape, both.dtype) == ((2, 16, 16, 1), np.uint8)
    assert np.array_equal(images_of(model, [PROMPT], 5), both[:1])
    assert not np.array_equal(both[0], both[1])
    assert not np.array_equal(images_of(model, [PROMPT], 6), both[:1])
    assert not np.array_equal(images_of(model, ["an eight right of a one"], 5), both[:1])


def test_prompts_are_refused_by_a_model_of_classes_and_classes_by_one_of_prompts(
    world: World, text_results: Path, tmp_path: Path
):
    with pytest.raises(UserError, match="is a model of classes: use --class"):
        generate(world.teacher, [PROMPT], tmp_path / "out", **ONE)
    with pytest.raises(UserError, match="is a model of prompts: use --prompt"):
        generate(text_results / "dmd2_1step", [3], tmp_path / "out", **ONE)
    assert not (tmp_path / "out").exists()


def test_classes_are_generated_with_a_model_of_classes(world: World, tmp_path: Path):
    written = generate(world.student, [3, 4], tmp_path / "out", **ONE | {"num": 2})
    assert [path.name for path in written] == [f"{number:04d}.png" for number in range(4)]


@pytest.mark.parametrize("label", [-1, 10])
def test_a_class_that_the_data_has_not_is_refused(world: World, tmp_path: Path, label: int):
    with pytest.raises(UserError, match=f"--class {label}: .* has the classes 0 to 9"):
        generate(world.student, [3, label], tmp_path / "out", **ONE)


def test_a_prompt_that_the_data_has_not_is_refused(text_results: Path, tmp_path: Path):
    with pytest.raises(UserError, match="'a cat' is not a caption of digit_pairs"):
        generate(text_results / "dmd2_1step", [PROMPT, "a cat"], tmp_path / "out", **ONE)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("labels", [{}, {"prompt": [PROMPT], "classes": [3]}])
def test_either_prompts_or_classes_are_named(labels: dict[str, Any], tmp_path: Path):
    with pytest.raises(UserError, match="either --prompt or --class"):
        planning.generate(tmp_path, **labels)


@pytest.mark.parametrize("lora", [False, True])
def test_missing_components_are_named(text_results: Path, tmp_path: Path, lora: bool):
    alone = run_alone(text_results, tmp_path)
    for refused in (
        lambda: generate(alone, [PROMPT], tmp_path / "out", **ONE),
        lambda: export(alone, tmp_path / "out", lora=lora),
    ):
        with pytest.raises(
            UserError, match=r"components\.json: the text encoder and autoencoder of .* copy them along"
        ):
            refused()
    assert not (tmp_path / "out").exists()


def test_a_damaged_component_is_named(text_results: Path, tmp_path: Path):
    shutil.copytree(text_results, tmp_path / "copy")
    damaged = tmp_path / "copy/components/vae/diffusion_pytorch_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match=r"components/vae/diffusion_pytorch_model\.safetensors"):
        open_run(tmp_path / "copy/dmd2_1step", "cpu")


def test_a_folder_without_weights_is_named(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        generate(tmp_path / "empty", [PROMPT], tmp_path / "out", **ONE)


def test_weights_that_differ_from_their_record_are_refused(text_results: Path, tmp_path: Path):
    weights = run_alone(text_results, tmp_path) / "generator.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match="SHA-256 differs"):
        generate(weights, [PROMPT], tmp_path / "out", **ONE)


@pytest.mark.parametrize("lora", [False, True])
def test_a_teacher_and_a_model_of_classes_are_not_exported(
    world: World, text_results: Path, tmp_path: Path, lora: bool
):
    for weights in (text_results / "teacher", world.student):
        with pytest.raises(UserError, match="is no text-to-image student"):
            export(weights, tmp_path / "out", lora=lora)
    assert not (tmp_path / "out").exists()


def test_adapters_that_were_not_trained_are_not_exported(text_results: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"trained no adapters .* export it without --lora"):
        export(text_results / "dmd2_1step", tmp_path / "out", lora=True)
    assert not (tmp_path / "out").exists()
