"""What is refused or reported before a training reads its batches."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dmd2.config import Prompts
from dmd2.errors import UserError
from dmd2.lineage.spec import Spec
from dmd2.stages.batches import check_encoder, num_cut, prompt_batches, with_cached_prompts
from dmd2.stages.generate import open_run


def test_latents_of_another_autoencoder_are_refused(text_results: Path):
    teacher = open_run(text_results / "teacher", "cpu").teacher
    facts, manifest = teacher.codec.facts, Path("latents/manifest.json")  # type: ignore[attr-defined]
    check_encoder(manifest, {**facts, "decode_psnr": 30.0}, teacher.codec)
    check_encoder(manifest, {}, teacher.codec)  # of pixels
    check_encoder(manifest, facts, SimpleNamespace())
    for key, value in (("encoder_sha256", "00"), ("scaling_factor", 0.5), ("shift_factor", 1.0)):
        with pytest.raises(UserError, match=rf"manifest\.json: latents of another autoencoder: {key} is {value}"):
            check_encoder(manifest, {**facts, key: value}, teacher.codec)


def test_prompts_that_the_tokenizer_cuts_are_counted(text_results: Path):
    teacher = open_run(text_results / "teacher", "cpu").teacher
    fits, long = "a three left of a seven", "a three left of a seven left of a seven"
    assert num_cut(teacher, [fits, long, fits, long]) == 2
    assert num_cut(SimpleNamespace(conditioner=SimpleNamespace()), [long]) == 0  # type: ignore[arg-type]


def test_few_prompts_are_embedded_once_and_their_encoders_dropped(text_results: Path, tmp_path: Path):
    teacher, cpu, file = (
        open_run(text_results / "teacher", "cpu").teacher,
        torch.device("cpu"),
        tmp_path / "prompts.txt",
    )
    file.write_text("a three left of a seven\na seven left of a three\na two left of a two\na seven left of a three\n")
    spec = Spec.of("train", "x", prompts=Prompts(path=str(file)))
    assert with_cached_prompts(spec, teacher, 2, cpu) is teacher
    assert with_cached_prompts(Spec.of("train", "x"), teacher, 2, cpu) is teacher
    cached = with_cached_prompts(spec, teacher, 3, cpu)
    assert not hasattr(cached.conditioner, "encoders")
    batches = prompt_batches(spec, cached, 4, 0, cpu)
    assert batches is not None
    tokens = batches(0)[1]
    wanted, found = (each.conditioner.embed(tokens) for each in (teacher, cached))
    for each, other in ((wanted, found), (teacher.conditioner.null(wanted), cached.conditioner.null(found))):
        assert each.keys() == other.keys()
        for name in each:
            torch.testing.assert_close(other[name], each[name], rtol=1e-5, atol=1e-6)
