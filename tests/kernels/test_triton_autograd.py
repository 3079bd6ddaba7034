"""The registered ops: gradcheck in double, opcheck, torch.compile without a graph break, and double differentiation."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import dmd2_kernels as dk

pytestmark = pytest.mark.usefixtures("triton_path")
OPS = torch.ops.dmd2


def doubles(device: str, *shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(s, dtype=torch.float64, device=device, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("with_head", [False, True])
def test_gradcheck_denoising(with_head: bool, device: str) -> None:
    out, target, x = doubles(device, *[(2, 2, 3, 3)] * 3)
    sigma = torch.tensor([0.3, 2.0], dtype=torch.float64, device=device)
    at = {"x": x.detach(), "head": dk.LinearHead.edm(sigma, 0.5)} if with_head else {}
    assert torch.autograd.gradcheck(lambda out: dk.denoising_loss(out, target.detach(), sigma**-2, **at).loss, (out,))


@pytest.mark.parametrize("kind", ["softplus", "hinge"])
def test_gradcheck_gan(kind: str, device: str) -> None:
    gen, data, moved = doubles(device, (5, 1), (3, 1), (3, 1))

    def critic(gen: Tensor, data: Tensor, moved: Tensor) -> Tensor:
        return dk.gan_critic_loss(gen, data, kind=kind, perturbed_data_logits=moved, r1_weight=0.3).loss

    assert torch.autograd.gradcheck(critic, (gen, data, moved))
    assert torch.autograd.gradcheck(lambda gen: dk.gan_generator_loss(gen, kind=kind).loss, (gen,))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_gradcheck_group_norm_silu(layout: torch.memory_format, device: str) -> None:
    x, weight, bias, scale, shift = doubles(device, (2, 6, 3, 2), (6,), (6,), (2, 6), (2, 6))

    def op(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        x = x.contiguous(memory_format=layout)
        return dk.group_norm_silu(x, 2, weight, bias, scale=scale, shift=shift)

    assert torch.autograd.gradcheck(op, (x, weight, bias, scale, shift), fast_mode=True)


def test_the_matching_gradient_in_double_is_that_of_the_reference(device: str) -> None:
    x0, real, fake, x, uncond = doubles(device, *[(3, 2, 3, 3)] * 5)
    head = dk.LinearHead.epsilon(0.07, torch.full((3,), 0.99, dtype=torch.float64, device=device))
    answers = []
    for mode in ("reference", "triton"):
        with dk.use(mode):
            out = dk.matching_loss(x0, real, fake, x=x, head=head, real_uncond=uncond, guidance_scale=7.3)
            answers.append((*out[:3], *torch.autograd.grad(2.5 * out.loss, x0)))
    for mine, true in zip(*answers, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-14)


def calls(device: str) -> dict[str, tuple[Callable[..., object], tuple[object, ...]]]:
    """Every op; the losses return gradients and have none of their own, the norm has one."""
    torch.manual_seed(0)
    x0, real, fake, x, out = (torch.randn(2, 3, 5, device=device) for _ in range(5))
    a, k = torch.rand(2, 2, device=device)
    gen, data, moved = (torch.randn(n, device=device) for n in (4, 3, 3))
    wide, half = torch.float32, torch.bfloat16
    plain = torch.randn(2, 6, 4, 4, device=device)
    nhwc = plain.contiguous(memory_format=torch.channels_last)
    image, last = (t.clone().requires_grad_() for t in (plain, nhwc))
    w, b = (torch.randn(6, device=device, requires_grad=True) for _ in range(2))
    s, t = (torch.randn(2, 6, device=device, requires_grad=True) for _ in range(2))
    other = torch.randn(2, 6, 4, 4, device=device, requires_grad=True)
    column, rows = (torch.randn(*n, device=device, requires_grad=True) for n in ((6,), (2, 6)))
    return {
        "norm of a sum": (OPS.group_norm_silu, (image, 2, w, b, 1e-5, s, t, True, column, other, 0.7)),
        "norm with rows of biases": (OPS.group_norm_silu, (nhwc, 2, w, b, 1e-5, None, None, True, rows, None, 1.0)),
        "residual sum": (OPS.residual_sum, (nhwc, other, column, 0.7)),
        "matching": (OPS.matching_loss_and_grad, (x0, real, fake, *(None,) * 5, 1.0, 1.0, wide)),
        "matching head": (OPS.matching_loss_and_grad, (x0, real, fake, x, a, k, real, a, 1.5, 0.5, half)),
        "matching in double": (OPS.matching_loss_and_grad, (x0.double(), real, fake, *(None,) * 5, 1.0, 1.0, wide)),
        "matching nhwc": (OPS.matching_loss_and_grad, (plain, nhwc, nhwc, plain, a, k, None, None, 1.0, 1.0, wide)),
        "denoising": (OPS.denoising_loss_and_grad, (out, real, a, x, a, k, 1.0, half)),
        "denoising nhwc": (OPS.denoising_loss_and_grad, (nhwc, plain, a, plain, a, k, 1.0, wide)),
        "denoising without a gradient": (OPS.denoising_loss_and_grad, (out, real, a, None, None, None, 1.0, None)),
        "critic": (OPS.gan_critic_loss_and_grad, (gen, data, moved, "softplus", 0.5, 1.0, False, None)),
        "critic without r1": (OPS.gan_critic_loss_and_grad, (gen, data, None, "hinge", 0.0, 1.0, True, wide)),
        "generator": (OPS.gan_generator_loss_and_grad, (gen, "softplus", 1.0, True, None)),
        "norm": (OPS.group_norm_silu, (image, 2, w, b, 1e-5, None, None, True)),
        "adaptive norm": (OPS.group_norm_silu, (image, 2, w, b, 1e-5, s, t, True)),
        "nhwc norm": (OPS.group_norm_silu, (last, 2, w, b, 1e-5, s, t, False)),
    }


@pytest.mark.parametrize("name", list(calls("cpu")))
def test_opcheck(name: str, device: str) -> None:
    op, arguments = calls(device)[name]
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_fullgraph_compile_of_every_public_op_gives_the_eager_answer(mode: str, device: str) -> None:
    torch.manual_seed(0)
    norm = dk.GroupNormSiLU(6, 2).to(device)

    def step(x0: Tensor, real: Tensor, fake: Tensor, logits: Tensor, sigma: Tensor) -> Tensor:
        head = dk.LinearHead.edm(sigma, 0.5)
        z = norm(x0, sigma[:, None].expand(2, 6), sigma[:, None].expand(2, 6))
        matching = dk.matching_loss(z, real, fake, x=real, head=head)
        denoising = dk.denoising_loss(z, fake, sigma, x=real, head=head)
        critic = dk.gan_critic_loss(logits, logits * 2, perturbed_data_logits=logits * 3, r1_weight=0.1)
        return matching.loss + denoising.loss + critic.loss + dk.gan_generator_loss(logits).loss

    x0, real, fake = torch.randn(3, 2, 6, 4, 4, device=device)
    logits, sigma = torch.randn(2, 1, device=device), torch.tensor([0.3, 2.0], device=device)
    answers = []
    with dk.use(mode):
        for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            inputs = [x0.clone().requires_grad_(), real, fake, logits.clone().requires_grad_(), sigma]
            total = run(*inputs)
            total.backward()
            answers.append((total.detach(), inputs[0].grad, inputs[3].grad))
    for eager, compiled in zip(*answers, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_norm_past_the_dispatcher_is_the_op_bit_for_bit(
    adaptive: bool, layout: torch.memory_format, device: str
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 4, 3, device=device).contiguous(memory_format=layout)
    vectors = [torch.randn(shape, device=device) for shape in [(6,), (6,), (2, 6), (2, 6)]]
    scale, shift = vectors[2:] if adaptive else (None, None)
    leaves = [x, *vectors[: 4 if adaptive else 2]]
    for leaf in leaves:
        leaf.requires_grad_()
    through_op = OPS.group_norm_silu(x, 2, *vectors[:2], 1e-5, scale, shift, True)[0]
    direct = dk.group_norm_silu(x, 2, *vectors[:2], scale=scale, shift=shift)
    assert (through_op.grad_fn.name(), direct.grad_fn.name()) == (
        "GeneratedBackwardFor_dmd2_group_norm_silu_defaultBackward",
        "_DirectBackward",
    )
    with torch.no_grad():
        inferred = dk.group_norm_silu(x, 2, *vectors[:2], scale=scale, shift=shift)
    dy = torch.randn_like(direct)
    for one, other in zip(*(torch.autograd.grad(y, leaves, dy) for y in (through_op, direct)), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(through_op, direct)
    assert torch.equal(inferred, direct)
    assert direct.stride() == x.stride()


def test_a_second_derivative_of_the_norm_is_refused(device: str) -> None:
    x, weight = (torch.randn(shape, device=device, requires_grad=True) for shape in [(2, 6, 4), (6,)])
    y = dk.group_norm_silu(x, 2, weight, weight)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="group_norm_silu_backward"):
        grad.sum().backward()


def test_a_second_derivative_through_triton_is_refused(device: str) -> None:
    out = torch.randn(2, 3, device=device, requires_grad=True)
    loss = dk.denoising_loss(out, torch.zeros_like(out), torch.ones(2, device=device)).loss
    (grad,) = torch.autograd.grad(loss, out, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        (grad.sum() + out.sum()).backward()


def test_logged_values_carry_no_graph(device: str) -> None:
    x0 = torch.randn(2, 3, device=device, requires_grad=True)
    out = dk.matching_loss(x0, torch.zeros_like(x0), torch.ones_like(x0))
    critic = dk.gan_critic_loss(x0[:, 0], x0[:, 1])
    denoising = dk.denoising_loss(x0, torch.zeros_like(x0), torch.ones(2, device=device))
    logged = (*out[1:], *critic[1:], denoising.per_sample, dk.gan_generator_loss(x0[:, 0]).p_gen)
    assert not any(t.requires_grad for t in logged)
    assert out.loss.requires_grad
    assert critic.loss.requires_grad
