"""Cached embeddings: the same conditions as the encoders', for the listed prompts alone."""

import pytest
import torch
from tiny_pipelines import KINDS, tiny_data, tiny_teacher, write_pipeline

from dmd2.errors import UserError
from dmd2.teachers import load_space
from dmd2.teachers.text_cache import CachedConditioner
from dmd2.teachers.text_encoder import TextConditioner

PROMPTS = [f"{a} {b}" for a in ("three", "red", "cat", "dog") for b in ("left", "right", "of", "photo", "a")] * 5
REPEATED = ["cat photo", "three left", "cat photo", "dog a"]


@pytest.fixture(scope="module", params=KINDS)
def conditioner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextConditioner:
    folder = write_pipeline(request.param, tmp_path_factory.mktemp(request.param))
    found = load_space(tiny_teacher(request.param), tiny_data(), folder)[1]
    assert isinstance(found, TextConditioner)
    return found


def test_looked_up_conditions_are_the_encoders(conditioner: TextConditioner) -> None:
    cached, tokens = CachedConditioner(conditioner, PROMPTS), conditioner.tokenize(REPEATED)
    wanted, found = conditioner.embed(tokens), cached.embed(cached.tokenize(REPEATED))
    assert wanted.keys() == found.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6)
    null, cached_null = conditioner.null(wanted), cached.null(found)
    for name in null:
        torch.testing.assert_close(cached_null[name], null[name], rtol=1e-5, atol=1e-6)


def test_half_the_memory_costs_half_precision(conditioner: TextConditioner) -> None:
    cached = CachedConditioner(conditioner, PROMPTS, dtype=torch.float16)
    wanted, found = (c.embed(conditioner.tokenize(REPEATED)) for c in (conditioner, cached))
    assert found["text"].dtype == torch.float32
    error = (found["text"] - wanted["text"]).abs().max()
    assert 0 < error < 1e-2


def test_another_prompt_is_refused(conditioner: TextConditioner) -> None:
    cached = CachedConditioner(conditioner, PROMPTS)
    with pytest.raises(UserError, match="not among those whose embeddings are cached"):
        cached.embed(cached.tokenize(["cat photo", "a seven"]))
