"""What is refused or reported before a training reads its batches."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from dmd2.errors import UserError
from dmd2.stages.batches import check_encoder, num_cut
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
