"""Captions as conditions: equal to what stock pipelines of diffusers compute, null prompts, and long prompts."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny_pipelines import KINDS, LENGTH, RESOLUTION, WIDTH, tiny_data, tiny_pipeline, tiny_teacher, write_pipeline

from dmd2.errors import UserError
from dmd2.method.denoiser import Conditioner
from dmd2.teachers import load_space
from dmd2.teachers.text_encoder import TextConditioner, TextShape

CAPTIONS = ["a three left of a seven", "red cat!", ""]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pipeline(kind: str) -> Any:
    return tiny_pipeline(kind)


@pytest.fixture
def conditioner(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Conditioner:
    folder = write_pipeline(kind, tmp_path_factory.mktemp(kind))
    return load_space(tiny_teacher(kind), tiny_data(), folder)[1]


def test_conditions_are_the_stock_pipelines(kind: str, pipeline: Any, conditioner: Conditioner) -> None:
    cond = conditioner.embed(conditioner.tokenize(CAPTIONS))
    found = pipeline.encode_prompt(
        CAPTIONS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt=None
    )
    text, null = found[:2]
    assert torch.equal(cond["text"], text)
    assert torch.equal(conditioner.null(cond)["text"], null)
    if kind == "sd15":
        assert set(cond) == {"text"}
        return
    assert torch.equal(cond["pooled"], found[2])
    assert torch.equal(conditioner.null(cond)["pooled"], found[3])
    size = (RESOLUTION, RESOLUTION)
    expected = pipeline._get_add_time_ids(size, (0, 0), size, torch.float32, text_encoder_projection_dim=WIDTH)
    assert torch.equal(cond["time_ids"], expected.repeat(len(CAPTIONS), 1))


def test_null_conditions_keep_each_samples_time_ids(kind: str, conditioner: Conditioner) -> None:
    cond = dict(conditioner.embed(conditioner.tokenize(CAPTIONS)))
    if kind == "sdxl":
        cond["time_ids"] = cond["time_ids"] + torch.arange(3)[:, None]
    null = conditioner.null(cond)
    assert null is not None
    assert {name: value.shape for name, value in null.items()} == {name: value.shape for name, value in cond.items()}
    assert not torch.equal(null["text"][0], cond["text"][0])
    if kind == "sdxl":
        assert torch.equal(null["time_ids"], cond["time_ids"])
        assert not null["text"].any()
        assert not null["pooled"].any()
    else:
        assert torch.equal(null["text"][0], cond["text"][2])  # the empty prompt


def test_tokens_are_small_and_conditions_have_no_gradient(kind: str, conditioner: Conditioner) -> None:
    tokens = conditioner.tokenize(np.array(CAPTIONS))
    assert list(tokens) == (["ids"] if kind == "sd15" else ["ids", "ids_2"])
    assert {(value.dtype, tuple(value.shape)) for value in tokens.values()} == {(torch.int32, (3, LENGTH))}
    assert not any(value.requires_grad for value in conditioner.embed(tokens).values())
    assert conditioner.draw(3, torch.Generator()) is None


def test_a_samples_conditions_do_not_depend_on_the_batch(conditioner: Conditioner) -> None:
    tokens = conditioner.tokenize(CAPTIONS)
    alone = conditioner.embed({name: ids[1:2] for name, ids in tokens.items()})
    for name, value in conditioner.embed(tokens).items():
        torch.testing.assert_close(value[1:2], alone[name])


def test_truncated_prompts_are_counted(conditioner: Any) -> None:
    fits = "a red cat left of three"  # with both special tokens 8, the length
    conditioner.tokenize([fits, "", "zebra"])
    assert conditioner.num_truncated == 0
    tokens = conditioner.tokenize([f"{fits} seven", fits, "wildebeest photo"])
    assert conditioner.num_truncated == 2
    conditioner.tokenize([f"{fits} dog"])
    assert conditioner.num_truncated == 3
    assert torch.equal(tokens["ids"][0], tokens["ids"][1])


def test_only_texts_are_captions(conditioner: Conditioner) -> None:
    with pytest.raises(UserError, match="caption 1 of a batch is 7, not a text"):
        conditioner.tokenize(["a", 7])


def test_a_plan_has_conditions_of_the_right_shapes(kind: str) -> None:
    _, planned = load_space(tiny_teacher(kind), tiny_data())
    cond = planned.embed(planned.tokenize(["a cat"] * 2))
    width = WIDTH if kind == "sd15" else 2 * WIDTH
    wanted = {"text": (2, 77, width)} | ({"pooled": (2, WIDTH), "time_ids": (2, 6)} if kind == "sdxl" else {})
    assert {name: tuple(value.shape) for name, value in cond.items()} == wanted
    assert planned.null(cond).keys() == cond.keys()


def test_an_empty_batch_has_no_tokens() -> None:
    assert TextConditioner(TextShape(8)).tokenize([])["ids"].shape == (0, 77)
