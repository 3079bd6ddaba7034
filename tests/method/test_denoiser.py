"""Guidance and batches of conditions."""

import pytest
import torch
from toy import SHAPE, labels, recorded, rng, toy_teacher

from dmd2.method.denoiser import concat, guided


def inputs(num: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(num, *SHAPE, generator=rng()), torch.linspace(0.1, 5, num)


def test_guidance_goes_from_the_unconditional_estimate_through_the_conditional_one():
    teacher = toy_teacher(guidable=True)
    x, sigma = inputs()
    null = teacher.conditioner.null(labels(5))
    x0_null = teacher.denoiser(x, sigma, {"label": torch.full((5,), 2)}).double()
    x0_cond = teacher.denoiser(x, sigma, labels(5)).double()
    for scale in (0.0, 1.75, 8.0):
        with recorded(teacher.denoiser) as calls:
            found = guided(teacher.denoiser, x, sigma, labels(5), null, scale)
        assert len(calls) == 1, "one batch of both"
        torch.testing.assert_close(found.double(), x0_null + scale * (x0_cond - x0_null), rtol=1e-5, atol=1e-5)


def test_guidance_on_x0_equals_guidance_on_epsilon():
    teacher = toy_teacher(guidable=True)
    x, sigma = inputs()
    at = sigma.view(-1, 1, 1, 1)
    null = teacher.conditioner.null(labels(5))
    eps_null, eps_cond = ((x - teacher.denoiser(x, sigma, cond)) / at for cond in (null, labels(5)))
    x0 = x - at * (eps_null + 1.75 * (eps_cond - eps_null))
    found = guided(teacher.denoiser, x, sigma, labels(5), null, 1.75)
    torch.testing.assert_close(found, x0, rtol=1e-5, atol=1e-5)


def test_scale_one_is_one_plain_pass_and_needs_no_null():
    teacher = toy_teacher()
    x, sigma = inputs()
    with recorded(teacher.denoiser) as calls:
        found = guided(teacher.denoiser, x, sigma, labels(5), None, 1.0)
    assert [len(call.x) for call in calls] == [5]
    assert torch.equal(found, teacher.denoiser(x, sigma, labels(5)))


def test_guidance_without_a_null_condition_is_an_error():
    x, sigma = inputs()
    with pytest.raises(ValueError, match=r"1\.75.*unconditional"):
        guided(toy_teacher().denoiser, x, sigma, labels(5), None, 1.75)


def test_conditions_concatenate_by_name():
    joined = concat([{"label": torch.tensor([1, 2])}, {"label": torch.tensor([0])}])
    assert joined["label"].tolist() == [1, 2, 0]


def test_a_copied_network_shares_no_weight_with_the_frozen_teacher():
    teacher = toy_teacher()
    copy = teacher.copy_network()
    assert all(p.requires_grad for p in copy.parameters())
    assert not any(p.requires_grad for p in teacher.denoiser.parameters())
    with torch.no_grad():
        for p in copy.parameters():
            p.add_(1)
    for ours, theirs in zip(copy.parameters(), teacher.denoiser.parameters(), strict=True):
        torch.testing.assert_close(ours - 1, theirs)
