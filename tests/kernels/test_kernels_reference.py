"""The plain-torch definitions against closed forms, published numbers and autograd of the published expressions."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dmd2_kernels as dk


def published_matching_loss(x0: Tensor, x0_real: Tensor, x0_fake: Tensor) -> Tensor:
    """0.5 * MSE(x0, stopgrad(x0 - g)), as DMD2 writes it."""
    with torch.no_grad():
        p_real, p_fake = x0 - x0_real, x0 - x0_fake
        g = torch.nan_to_num((p_real - p_fake) / p_real.abs().mean(dim=(1, 2, 3), keepdim=True))
    return 0.5 * F.mse_loss(x0, (x0 - g).detach())


def test_matching_loss_of_the_test_vector() -> None:
    x0 = (torch.arange(1.0, 13) / 10).reshape(2, 1, 2, 3).requires_grad_()
    out = dk.matching_loss(x0, torch.full_like(x0, 0.2), torch.full_like(x0, -0.1))
    out.loss.backward()
    g = torch.tensor([-1.6363635, -0.4]).repeat_interleave(6).reshape(2, 1, 2, 3)
    torch.testing.assert_close(out.weight, torch.tensor([0.1833333, 0.75]), rtol=1e-6, atol=0)
    torch.testing.assert_close(out.loss.detach(), torch.tensor(0.7094214), rtol=1e-6, atol=0)
    torch.testing.assert_close(out.sq_norm, torch.tensor([16.0661114, 0.96]), rtol=1e-6, atol=0)
    torch.testing.assert_close(x0.grad, g / 12, rtol=1e-6, atol=0)


def test_gan_losses_of_the_test_vector() -> None:
    gen, data = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([-0.3, 0.0, 4.0])
    torch.testing.assert_close(dk.gan_generator_loss(gen).loss, torch.tensor(0.6380889), rtol=1e-6, atol=0)
    torch.testing.assert_close(dk.gan_critic_loss(gen, data).loss, torch.tensor(1.6599731), rtol=1e-6, atol=0)


def test_matching_loss_and_gradient_equal_the_published_expression() -> None:
    x0, real, fake = torch.randn(3, 4, 3, 8, 8, dtype=torch.float64)
    x0.requires_grad_()
    (expected,) = torch.autograd.grad(published_matching_loss(x0, real, fake), x0)
    out = dk.matching_loss(x0, real, fake)
    (grad,) = torch.autograd.grad(3 * out.loss, x0)
    torch.testing.assert_close(out.loss, published_matching_loss(x0, real, fake), rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, 3 * expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(dk.matching_loss_and_grad(x0, real, fake)[1], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("guidance_scale", [1.0, 8.0])
def test_raw_outputs_with_a_head_equal_x0_predictions(guidance_scale: float) -> None:
    x0, x, real, uncond, fake = torch.randn(5, 3, 4, 8, 8, dtype=torch.float64)
    sigma = torch.tensor([0.3, 4.0, 60.0], dtype=torch.float64)
    alpha = (1 + sigma**2).rsqrt()
    s, al = sigma[:, None, None, None], alpha[:, None, None, None]
    heads = {
        "edm": (dk.LinearHead.edm(sigma, 0.5), lambda o: 0.25 / (s**2 + 0.25) * x + s * 0.5 / (s**2 + 0.25) ** 0.5 * o),
        "epsilon": (dk.LinearHead.epsilon(alpha, alpha * sigma), lambda o: (x - al * s * o) / al),
        "v": (dk.LinearHead.v(alpha, alpha * sigma), lambda o: al * (x - s * o)),
        "flow": (dk.LinearHead.flow(sigma / 100), lambda o: x - s / 100 * o),
    }  # fmt: skip
    for name, (head, to_x0) in heads.items():
        guided = uncond + guidance_scale * (real - uncond)
        free = {} if guidance_scale == 1 else {"real_uncond": uncond, "guidance_scale": guidance_scale}
        raw, raw_grad = dk.matching_loss_and_grad(x0, real, fake, x=x, head=head, **free)
        plain, grad = dk.matching_loss_and_grad(x0, to_x0(guided), to_x0(fake))
        torch.testing.assert_close(raw, plain, rtol=1e-9, atol=0, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(raw_grad, grad, rtol=1e-8, atol=1e-12)


def test_denoising_loss_and_gradient_equal_autograd() -> None:
    out, target, x = torch.randn(3, 5, 2, 4, 4, dtype=torch.float64)
    out.requires_grad_()
    sigma = torch.rand(5, dtype=torch.float64) + 0.1
    weight, head = sigma**-2 + 4, dk.LinearHead.edm(sigma, 0.5)
    x0_hat = head.a.view(5, 1, 1, 1) * x + head.k.view(5, 1, 1, 1) * out
    expected = (weight.view(5, 1, 1, 1) * (x0_hat - target) ** 2).mean()
    got = dk.denoising_loss(out, target, weight, x=x, head=head)
    torch.testing.assert_close(got.loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.per_sample.mean(), expected.detach(), rtol=1e-12, atol=0)
    for mine, theirs in zip(torch.autograd.grad(got.loss, out), torch.autograd.grad(expected, out), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["softplus", "hinge"])
def test_gan_losses_pass_gradcheck_in_double(kind: str) -> None:
    gen, data, perturbed = (torch.randn(n, 1, dtype=torch.float64, requires_grad=True) for n in (5, 3, 3))

    def critic(gen: Tensor, data: Tensor, perturbed: Tensor) -> Tensor:
        return dk.gan_critic_loss(gen, data, kind=kind, perturbed_data_logits=perturbed, r1_weight=0.7).loss

    assert torch.autograd.gradcheck(critic, (gen, data, perturbed))
    assert torch.autograd.gradcheck(lambda gen: dk.gan_generator_loss(gen, kind=kind).loss, (gen,))


def test_r1_of_an_unperturbed_sample_is_exactly_zero() -> None:
    data = torch.randn(7, 1, requires_grad=True)
    out = dk.gan_critic_loss(torch.randn(7, 1), data, perturbed_data_logits=data.detach().clone(), r1_weight=100.0)
    without = dk.gan_critic_loss(torch.zeros(7, 1), data)
    assert out.r1.item() == 0
    torch.testing.assert_close(
        torch.autograd.grad(out.loss, data), torch.autograd.grad(without.loss, data), rtol=0, atol=0
    )


def test_softplus_keeps_the_losses_of_confident_critics() -> None:
    out = dk.gan_generator_loss(torch.tensor([90.0]))
    torch.testing.assert_close(out.loss.double(), torch.tensor(-90.0).double().exp(), rtol=1e-6, atol=0)
    assert dk.gan_generator_loss(torch.tensor([-90.0])).loss.item() == 90


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("shape", [(2, 12, 3, 5), (1, 6), (3, 8, 7)])
def test_group_norm_silu_equals_the_composition_of_torch_ops(shape: tuple[int, ...], adaptive: bool) -> None:
    x, channels = torch.randn(shape, dtype=torch.float64) * 3 + 1, shape[1]
    weight, bias = torch.randn(2, channels, dtype=torch.float64)
    scale, shift = torch.randn(2, shape[0], channels, dtype=torch.float64)
    ones = (1,) * (len(shape) - 2)
    z = F.group_norm(x, 2, weight, bias, 1e-5)
    if adaptive:
        z = z * (1 + scale.view(shape[0], channels, *ones)) + shift.view(shape[0], channels, *ones)
    rows = {"scale": scale, "shift": shift} if adaptive else {}
    torch.testing.assert_close(dk.group_norm_silu(x, 2, weight, bias, **rows), F.silu(z), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dk.group_norm_silu(x, 2, weight, bias, silu=False, **rows), z, rtol=1e-12, atol=1e-12)


def test_module_has_the_state_dict_of_group_norm() -> None:
    norm, plain = dk.GroupNormSiLU(12, 3), torch.nn.GroupNorm(3, 12)
    plain.weight.data.normal_()
    norm.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(2, 12, 4, 4)
    torch.testing.assert_close(norm(x), F.silu(plain(x)), rtol=0, atol=0)


def test_every_special_value_is_replaced_as_nan_to_num_does_and_counted() -> None:
    nan, inf, big = float("nan"), float("inf"), torch.finfo(torch.float32).max
    x0 = torch.ones(6, 1, 1, 4)
    real, fake = torch.zeros(6, 1, 1, 4), torch.full((6, 1, 1, 4), 2.0)
    real[0] = 1  # w = 0 and d != 0
    real[1], fake[1] = 1, 1  # w = 0 and d = 0
    fake[2, ..., 0] = nan
    fake[3, ..., 0] = inf
    real[4, ..., 0] = nan
    x0[5, ..., 0] = inf
    out, grad = dk.matching_loss_and_grad(x0, real, fake)
    assert out.num_nonfinite.tolist() == [4, 4, 1, 1, 4, 0]
    assert out.sq_norm.tolist() == [inf, 0, 12, inf, 0, 0]
    torch.testing.assert_close(grad[0] * 24, torch.full((1, 1, 4), big))
    assert grad[1].eq(0).all()
    assert (grad[2] * 24).flatten().tolist() == [0, 2, 2, 2]
    assert grad[4].eq(0).all()
    assert grad[5].eq(0).all()
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    x0, real, fake = (torch.randn(2, 3, 16, 16) * 0.01 + 1).to(dtype).expand(3, -1, -1, -1, -1).clone()
    real, fake = real + 0.05, fake + 0.06
    out, grad = dk.matching_loss_and_grad(x0, real, fake)
    exact, exact_grad = dk.matching_loss_and_grad(x0.double(), real.double(), fake.double())
    assert out.loss.dtype == torch.float32
    assert grad.dtype == dtype
    torch.testing.assert_close(out.loss.double(), exact.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=2**-8, atol=torch.finfo(dtype).smallest_normal)


def test_only_x0_and_out_get_gradients_of_the_regression_losses() -> None:
    x0, real, fake, x = (torch.randn(2, 1, 4, 4, requires_grad=True) for _ in range(4))
    sigma = torch.rand(2, requires_grad=True)
    head = dk.LinearHead.edm(sigma, 0.5)
    dk.matching_loss(x0, real, fake, x=x, head=head).loss.backward()
    assert x0.grad is not None
    assert [t.grad for t in (real, fake, x, sigma)] == [None] * 4
    dk.denoising_loss(real, fake, sigma, x=x, head=head).loss.backward()
    assert real.grad is not None
    assert [t.grad for t in (fake, x, sigma)] == [None] * 3


def test_a_second_derivative_is_refused_not_wrong() -> None:
    out = torch.randn(2, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(dk.denoising_loss(out, torch.zeros(2, 3), torch.ones(2)).loss, out, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_a_cpu_call_does_not_import_triton() -> None:
    code = (
        "import sys, torch, dmd2_kernels as dk; x = torch.randn(2, 3, 8, 8); "
        "dk.matching_loss(x, x + 1, x - 1); dk.group_norm_silu(x, 3, torch.ones(3), torch.zeros(3)); "
        "assert dk.implementation(x) == 'reference'; assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_triton_op_without_gpu_or_interpreter_names_the_three_choices() -> None:
    code = (
        "import torch, dmd2_kernels; x = torch.randn(2, 3); "
        "torch.ops.dmd2.matching_loss_and_grad(x, x, x, *[None] * 5, 1.0, 1.0, torch.float32)"
    )
    env = {"PATH": "", "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    message = done.stderr.strip().splitlines()[-1]
    assert all(choice in message for choice in ("CUDA tensor", "TRITON_INTERPRET=1", "reference")), message
