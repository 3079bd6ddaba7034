"""Bad arguments: one line that names the argument, its value and the rule; odd but legal ones: the right answer."""

import math
import os
import re
import subprocess
import sys

import pytest
import torch
from closeness import assert_layout_and_dtype_do_not_matter

import dmd2_kernels as dk

X = torch.randn(2, 3, 4, 4)
HEAD = dk.LinearHead.flow(torch.tensor([0.1, 0.9]))
ONE = torch.ones(3)

BAD = {
    "real of another shape": (lambda: dk.matching_loss(X, X[:1], X), r"real has shape \(1, 3, 4, 4\) but x0 has"),
    "integer real": (lambda: dk.matching_loss(X, X.int(), X), "real has dtype torch.int32"),
    "complex x0": (lambda: dk.matching_loss(X + 0j, X, X), "x0 has dtype torch.complex64"),
    "a list": (lambda: dk.matching_loss([1.0], X, X), "x0 is a list"),
    "empty batch": (lambda: dk.matching_loss(X[:0], X[:0], X[:0]), r"x0 has shape \(0, 3, 4, 4\), which is empty"),
    "no batch": (lambda: dk.matching_loss(X[0, 0, 0, 0], X, X), r"x0 has shape \(\)"),
    "head without x": (lambda: dk.matching_loss(X, X, X, head=HEAD), "head is given without x"),
    "x without head": (lambda: dk.denoising_loss(X, X, ONE[:2], x=X), "x is given without head"),
    "head of another batch": (
        lambda: dk.matching_loss(X[:1], X[:1], X[:1], x=X[:1], head=HEAD),
        r"head.a has shape \(2,\); it must be \(1,\)",
    ),
    "guidance without uncond": (lambda: dk.matching_loss(X, X, X, guidance_scale=8.0), "guidance_scale is 8.0 but"),
    "another device": (lambda: dk.matching_loss(X, X.to("meta"), X), "real is on meta but x0 is on cpu"),
    "sample weight of the elements": (
        lambda: dk.matching_loss_and_grad(X, X, X, sample_weight=X),
        r"sample_weight has shape .*must be \(2,\)",
    ),
    "weight of the elements": (lambda: dk.denoising_loss(X, X, X), r"weight has shape .*must be \(2,\)"),
    "target of another shape": (lambda: dk.denoising_loss_and_grad(X, X[:, :1], ONE[:2]), "target has shape"),
    "unknown kind": (lambda: dk.gan_generator_loss(ONE, kind="wgan"), "kind is 'wgan'; it must be one of"),
    "patch logits": (
        lambda: dk.gan_critic_loss_and_grad(ONE, X),
        r"data_logits has shape \(2, 3, 4, 4\); it must be \(B,\)",
    ),
    "perturbed of another batch": (
        lambda: dk.gan_critic_loss(ONE, ONE, perturbed_data_logits=ONE[:2], r1_weight=1.0),
        "perturbed_data_logits has shape",
    ),
    "r1 without perturbed": (lambda: dk.gan_critic_loss(ONE, ONE, r1_weight=1.0), "r1_weight is 1.0 but perturbed"),
    "empty logits": (lambda: dk.gan_generator_loss_and_grad(ONE[:0]), "gen_logits has shape"),
    "groups that do not divide": (lambda: dk.group_norm_silu(X, 2, ONE, ONE), "num_groups is 2, which does not"),
    "no groups": (lambda: dk.GroupNormSiLU(4, 0), "num_groups is 0"),
    "weight of other channels": (lambda: dk.group_norm_silu(X, 1, ONE[:2], ONE), r"weight has .* must be \(3,\)"),
    "scale without shift": (lambda: dk.group_norm_silu(X, 1, ONE, ONE, scale=X[:, :, 0, 0]), "scale is given without"),
    "scale of one sample": (
        lambda: dk.group_norm_silu(X, 1, ONE, ONE, scale=ONE, shift=ONE),
        r"scale has shape \(3,\); it must be \(2, 3\)",
    ),
    "no channels": (lambda: dk.group_norm_silu(ONE, 1, ONE, ONE), r"x has shape \(3,\); it must be \(B, C, ...\)"),
    "unknown implementation": (lambda: dk.use("cuda").__enter__(), "mode is 'cuda'; it must be one of auto"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BAD))
def test_a_bad_argument_is_named_in_one_line(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_bad_environment_variable_is_named() -> None:
    env = os.environ | {"DMD2_KERNELS": "fast"}
    done = subprocess.run(
        [sys.executable, "-c", "import dmd2_kernels"], env=env, capture_output=True, text=True, check=False
    )
    assert re.search("DMD2_KERNELS is 'fast'; it must be one of auto, triton, reference", done.stderr)


def test_a_group_too_large_for_the_kernels_is_refused() -> None:
    x = torch.empty(1, 1, device="meta").expand(1, 2**31)
    one = torch.empty(2**31, device="meta")
    with dk.use("triton"), pytest.raises(ValueError, match="2147483648 elements in a group"):
        dk.group_norm_silu(x, 1, one, one)


def test_non_contiguous_and_mixed_dtypes_give_the_answer_of_contiguous_float32() -> None:
    assert_layout_and_dtype_do_not_matter("cpu")


def test_expanded_gradients_and_scalars_reach_the_kernels_whole() -> None:
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    dk.group_norm_silu(x, 3, ONE, ONE).sum().backward()  # the upstream gradient is an expanded scalar
    assert x.grad is not None
    assert math.isfinite(x.grad.sum().item())
