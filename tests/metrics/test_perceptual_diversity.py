"""LPIPS between the samples of one prompt, with a distance whose result is known, and the times of a sampler."""

import numpy as np
import pytest
import torch

from dmd2 import config
from dmd2.errors import UserError
from dmd2.metrics.context import Context
from dmd2.metrics.latency import measure_latency
from dmd2.metrics.measure import Batch, Labelled
from dmd2.metrics.perceptual_diversity import MAX_IMAGES, PerceptualDiversity, mean_distance


def flat(levels: list[int], side: int = 4) -> np.ndarray:
    return np.broadcast_to(np.array(levels, np.uint8)[:, None, None, None], (len(levels), side, side, 3)).copy()


def of_means(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The difference of grey levels, in [0, 255], as LPIPS would return it: (B, 1, 1, 1)."""
    return ((a - b).abs().mean(dim=(1, 2, 3), keepdim=True)) * 127.5


def test_mean_is_over_the_pairs_of_a_prompt_and_then_over_prompts():
    texts = np.array(["a", "b", "a", "c", "b", "a"])
    found = mean_distance(Labelled(flat([0, 10, 30, 99, 16, 90]), texts), of_means)
    assert found == pytest.approx(((30 + 90 + 60) / 3 + 6) / 2, rel=1e-5)  # c has one sample, and no pair


def test_equal_samples_of_a_prompt_are_not_diverse():
    samples = Labelled(flat([7, 200, 7, 200]), np.array(["a", "b", "a", "b"]))
    assert mean_distance(samples, of_means) == pytest.approx(0, abs=1e-5)


def test_prompts_without_a_second_sample_are_refused():
    with pytest.raises(UserError, match="none of the first 2 samples of a block have the same prompt"):
        mean_distance(Labelled(flat([1, 2]), np.array(["a", "b"])), of_means)


def test_pairs_may_be_in_different_batches_and_few_images_are_kept(monkeypatch: pytest.MonkeyPatch):
    measure = PerceptualDiversity(Context(None, 600, ("edm",), "cpu", config.Evaluation()))  # type: ignore[arg-type]
    monkeypatch.setattr(PerceptualDiversity, "_network", property(lambda _: of_means))
    levels, texts = np.arange(600) % 200, np.array([f"prompt {i % 100}" for i in range(600)])
    parts = [
        measure.observe(Batch(None, [flat(levels[i : i + 150])], texts[i : i + 150], i))  # type: ignore[arg-type]
        for i in range(0, 600, 150)
    ]
    merged = parts[0].merge(parts[1]).merge(parts[2]).merge(parts[3])
    assert len(merged.images) == len(merged.texts) == MAX_IMAGES
    # five samples of a prompt: levels i, i + 100, i, i + 100, i; six of ten pairs differ by 100
    # (the first twelve prompts have six: nine of fifteen)
    assert measure.value(merged)["lpips_diversity"] == pytest.approx(60, rel=1e-5)


def test_large_samples_are_kept_at_512_pixels():
    measure = PerceptualDiversity(Context(None, 2, ("edm",), "cpu", config.Evaluation()))  # type: ignore[arg-type]
    for side, kept in ((600, 512), (100, 100)):
        batch = Batch(None, [flat([5, 9], side)], np.array(["a", "a"]))  # type: ignore[arg-type]
        assert measure.observe(batch).images.shape == (2, kept, kept, 3)


def test_it_needs_vggs_weights():
    measure = PerceptualDiversity(Context(None, 2, ("edm",), "cpu", config.Evaluation()))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"evaluation\.vgg_weights is not set"):
        measure.value(Labelled(flat([1, 2]), np.array(["a", "a"])))


def test_latency_is_of_the_calls_after_the_warm_up(monkeypatch: pytest.MonkeyPatch):
    clock, requested = [0.0], []

    def make(i: int) -> None:
        requested.append(i)
        clock[0] += 100.0 if i < 2 else [1.0, 3.0][i % 2]

    monkeypatch.setattr("dmd2.metrics.latency.time.perf_counter", lambda: clock[0])
    found = measure_latency(make, warm_up=2, repeats=4)
    assert requested == list(range(6))
    assert found == {"mean": 2.0, "sd": pytest.approx(np.std([1, 3, 1, 3], ddof=1)), "blocks": [1.0, 3.0, 1.0, 3.0]}
    with pytest.raises(ValueError, match="repeats is 1"):
        measure_latency(make, repeats=1)
