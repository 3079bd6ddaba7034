"""What the released text-to-image evaluators do to the samples, as named protocols that are off by default."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import KINDS, tiny_data, tiny_teacher, write_pipeline
from world import WORKFLOW

from dmd2.config import Evaluation, Prompts, Sampler, Train
from dmd2.config.protocols import PROTOCOLS, describe
from dmd2.lineage.plan import Plan
from dmd2.lineage.spec import Spec
from dmd2.method.denoiser import Teacher
from dmd2.stages import sample as stage
from dmd2.teachers import load_teacher
from dmd2.training.rng import SampleNoise

LIST = ["a cat", "red!", "a three left of a seven"]
STUDENT = Sampler(kind="few_step")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def teacher(kind: str, tmp_path: Path) -> Teacher:
    return load_teacher(tiny_teacher(kind, write_pipeline(kind, tmp_path / "model")), tiny_data())


def spec(kind: str, folder: Path, protocol: str, **train: Any) -> Spec:
    file = folder / "prompts.txt"
    file.write_text("".join(f"{prompt}\n" for prompt in LIST))
    evaluation = Evaluation(protocols=(protocol,), prompts=Prompts(path=str(file)))
    sections = {"data": tiny_data(), "teacher": tiny_teacher(kind), "evaluation": evaluation}
    return Spec.of("sample", "run/student", sampler=STUDENT, train=Train.model_validate(train), **sections)


def test_they_are_off_by_default():
    usual = [name for name in PROTOCOLS if not name.endswith("_released")]
    assert {PROTOCOLS[name].sampling for name in usual} == {(False, None, False)}
    for name in ("sd15", "sdxl"):
        assert not any(used.endswith("_released") for used in Plan(WORKFLOW, name).preset.evaluation.protocols)
    assert describe(("coco30k_released",))["coco30k_released"]["alpha_bar"] == "0.0047"


def test_one_step_students_are_computed_with_the_rounded_alpha_bar(kind: str, teacher: Teacher, tmp_path: Path):
    found = stage.sample_x0(spec(kind, tmp_path, "coco30k_released"), teacher, range(3), STUDENT, 0)
    plain = stage.sample_x0(spec(kind, tmp_path, "coco30k"), teacher, range(3), STUDENT, 0)
    z = SampleNoise(0, range(3), teacher.sample_shape)().double()  # the network's input at the last level
    sigma = float(teacher.grid.sigmas[-1])
    own = 1 / (1 + sigma**2)
    eps = (z - own**0.5 * plain.double()) / (1 - own) ** 0.5
    wanted = (z - (1 - 0.0047) ** 0.5 * eps) / 0.0047**0.5
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3)
    assert (found - plain).abs().max() > 10 * (found.double() - wanted).abs().max()


@pytest.mark.parametrize("train", [{"num_steps": 4}, {"student_levels": [399]}])
def test_other_students_have_the_alpha_bar_of_their_levels(
    train: dict[str, Any], kind: str, teacher: Teacher, tmp_path: Path
):
    released, plain = (
        stage.sample_x0(spec(kind, tmp_path, name, **train), teacher, range(3), STUDENT, 0)
        for name in ("coco30k_released", "coco30k")
    )
    assert torch.equal(released, plain)


def test_the_first_tokenizer_serves_both_encoders():
    from tiny_pipelines import tiny_pipeline

    from dmd2.teachers.text_encoder import TextConditioner, TextShape

    pipe = tiny_pipeline("sdxl")
    given = [pipe.tokenizer, pipe.tokenizer_2], [pipe.text_encoder, pipe.text_encoder_2]
    right, wrong = (
        TextConditioner(TextShape(32, 16), *given, null="zeros", time_ids=(16, 16, 0, 0, 16, 16)) for _ in range(2)
    )
    wrong.use_first_tokenizer()
    tokens, mistaken = right.tokenize(LIST), wrong.tokenize(LIST)
    assert torch.equal(mistaken["ids_2"], mistaken["ids"])
    assert torch.equal(mistaken["ids"], tokens["ids"])
    assert not torch.equal(mistaken["ids_2"], tokens["ids_2"])
    one, other = right.embed(tokens), wrong.embed(mistaken)
    assert torch.equal(one["text"][..., :16], other["text"][..., :16]), "the first encoder's part"
    num = len(pipe.tokenizer("a cat").input_ids)
    torch.testing.assert_close(one["text"][0, :num], other["text"][0, :num])
    assert not torch.allclose(one["text"][0, num:], other["text"][0, num:]), "padding of another id"


def test_opening_a_model_gives_it_the_first_tokenizer(teacher: Teacher, kind: str, monkeypatch: pytest.MonkeyPatch):
    sections = {"evaluation": Evaluation(protocols=("coco10k_released",)), "data": tiny_data()}
    monkeypatch.setattr(stage, "open_teacher", lambda *given, **keys: teacher)
    model = stage.open_model(Spec.of("sample", "x", **sections), Path(), STUDENT, torch.device("cpu"))
    assert len({id(tokenizer) for tokenizer in model.conditioner.tokenizers}) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("protocol", ["coco10k", "coco10k_released"])
def test_tensor_float_32_is_allowed_while_sampling_and_put_back(
    protocol: str, kind: str, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before, seen = (matmul.allow_tf32, cudnn.allow_tf32), []
    original = stage.samples
    monkeypatch.setattr(
        stage, "samples",
        lambda *given: (seen.append((matmul.allow_tf32, cudnn.allow_tf32)), original(*given))[1],
    )  # fmt: skip
    stage.sample_images(spec(kind, tmp_path, protocol), teacher, range(2), STUDENT, 0)
    assert seen == [(True, True) if protocol.endswith("_released") else before]
    assert (matmul.allow_tf32, cudnn.allow_tf32) == before
