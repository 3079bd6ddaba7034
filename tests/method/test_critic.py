"""The critic's turn: fake score, discriminator and approximate R1 on one batch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toy import SHAPE, SIGMA_DATA, labels, rng, toy_teacher

from dmd2.config import Train
from dmd2.errors import UserError
from dmd2.method import losses
from dmd2.method.critic import Critic, RealismHead
from dmd2.method.denoiser import Prediction
from dmd2.method.noise import add_noise

TEACHER = toy_teacher()


def critic_of(seed: int = 1, *, num_taps: int = 1) -> Critic:
    torch.manual_seed(seed)
    return Critic(toy_teacher(seed).copy_network(), num_taps=num_taps)


def images(num: int, seed: int = 9) -> Tensor:
    return torch.randn(num, *SHAPE, generator=rng(seed))


def data(num: int = 5) -> tuple[Tensor, dict[str, Tensor]]:
    return images(num, 10) + 3, {"label": torch.full((num,), 2)}


def critic_turn(critic: Any, train: Train, source: Callable[[], Any] = data, num: int = 5) -> losses.CriticLosses:
    return losses.critic_losses(images(num), labels(num), source, TEACHER, critic, train, rng())


def seen_by(critic: Critic, train: Train) -> tuple[losses.CriticLosses, dict[str, Tensor], Tensor]:
    """The losses, the one batch that the critic was given, and its logits."""
    batches: list[tuple[Any, Any, Any]] = []
    handle = critic.register_forward_hook(lambda *call: batches.append(call[1:]), with_kwargs=True)
    result = critic_turn(critic, train)
    handle.remove()
    ((inputs, keywords, outputs),) = batches
    x, sigma, cond = inputs
    assert keywords["num_denoise"] == 5
    return result, {"x": x, "sigma": sigma, "label": cond["label"]}, outputs[1]


def pixels(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    return ((x - x0) / sigma.view(-1, 1, 1, 1))[sigma > 0.05]


def test_batch_is_score_then_generated_then_data_with_noises_of_their_own():
    _, seen, _ = seen_by(critic_of(), Train(gan_levels=(400, 999), critic_levels=(400, 999)))
    assert seen["label"].tolist() == labels(5)["label"].tolist() * 2 + [2] * 5
    clean = torch.cat([images(5), images(5), data()[0]])
    eps = pixels(seen["x"], clean, seen["sigma"])
    assert eps.shape[0] == 15
    assert 0.8 < float(eps.std()) < 1.2
    assert len(set(eps.flatten().tolist())) == eps.numel(), "noise used twice"


@pytest.mark.parametrize("r1_weight", [0.0, 1.0])
def test_one_pass_over_all_parts_equals_a_pass_for_each(r1_weight: float):
    critic, train = critic_of(), Train(r1_weight=r1_weight, r1_sigma=0.1, gan_critic_weight=0.3)
    result, seen, _ = seen_by(critic, train)
    parts = [{name: value[i : i + 5] for name, value in seen.items()} for i in range(0, len(seen["x"]), 5)]
    assert len(parts) == (4 if r1_weight else 3)
    score, *judged = parts

    def cond(part: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"label": part["label"]}

    x0_fake = critic.fake(score["x"], score["sigma"], cond(score)).double()
    weight = score["sigma"].double() ** -2 + SIGMA_DATA**-2
    by_hand = (weight[:, None, None, None] * (x0_fake - images(5)) ** 2).mean()
    torch.testing.assert_close(result.denoising.loss.double(), by_hand, rtol=1e-5, atol=0)

    gen, real, *moved = (
        critic.heads[0](critic.fake.denoise_and_tap(part["x"], part["sigma"], cond(part), 0)[1][0]).double()
        for part in judged
    )
    gan = torch.log1p(gen.exp()).mean() + torch.log1p((-real).exp()).mean()
    if moved:
        gan = gan + r1_weight * (moved[0] - real).square().mean()
    torch.testing.assert_close(result.gan.loss.double(), gan, rtol=1e-5, atol=0)
    params = dict(critic.named_parameters())
    truth = torch.autograd.grad(by_hand + 0.3 * gan, list(params.values()))
    result.backward()
    for (name, p), grad in zip(params.items(), truth, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max()), msg=name)


def test_shared_pass_judges_the_sample_that_the_fake_score_denoises():
    result, seen, logits = seen_by(critic_of(), Train(share_critic_pass=True))
    assert len(seen["x"]) == 10
    assert logits.shape == (10, 1)
    separate, all_seen, _ = seen_by(critic_of(), Train())
    assert torch.equal(seen["x"][:5], all_seen["x"][:5])
    torch.testing.assert_close(result.denoising.loss, separate.denoising.loss, rtol=1e-6, atol=0)
    gen = logits[:5].double()
    real = logits[5:].double()
    by_hand = torch.log1p(gen.exp()).mean() + torch.log1p((-real).exp()).mean()
    torch.testing.assert_close(result.gan.loss.double(), by_hand, rtol=1e-5, atol=0)


def test_gan_loss_moves_encoder_and_head_but_not_the_decoder():
    critic = critic_of()
    result = critic_turn(critic, Train())
    networks = {"encoder": critic.fake.encoder, "head": critic.heads[0], "decoder": critic.fake.decoder}
    logits, slopes = result.outputs[1:], result.grads[1:]
    grads = {
        name: torch.autograd.grad(logits, list(part.parameters()), slopes, retain_graph=True, allow_unused=True)
        for name, part in networks.items()
    }
    assert all(float(g.abs().sum()) > 0 for g in grads["encoder"])
    assert all(g is not None for g in grads["head"])
    assert sum(float(g.abs().sum()) for g in grads["head"]) > 0
    assert all(g is None or not g.any() for g in grads["decoder"])


def test_critic_loss_gives_no_gradient_to_images_data_or_teacher():
    critic, x0 = critic_of(), images(5).requires_grad_()
    x0_data, cond_data = data()
    x0_data.requires_grad_()
    source = lambda: (x0_data.detach(), cond_data)  # noqa: E731
    result = losses.critic_losses(x0.detach(), labels(5), source, TEACHER, critic, Train(), rng())
    result.backward()
    assert x0.grad is None
    assert x0_data.grad is None
    assert all(p.grad is None for p in TEACHER.denoiser.parameters())
    assert all(p.grad is not None for p in critic.parameters())


class SetLogits:
    """A critic with given logits that denoises to `x0` exactly."""

    def __init__(self, x0: Tensor, logits: list[float]):
        self.x0, self.logits = x0.requires_grad_(), torch.tensor(logits, requires_grad=True)

    def __call__(self, *_: Any, num_denoise: int, logits_from: int) -> tuple[Prediction, Tensor]:
        assert (num_denoise, logits_from) == (3, 3)
        return Prediction(self.x0), self.logits


def test_discriminator_loss_equals_the_test_vector():
    critic = SetLogits(images(3), [2.0, -1.0, 0.5, -0.3, 0.0, 4.0])
    result = critic_turn(critic, Train(gan_critic_weight=1e-2), lambda: data(3), num=3)
    assert float(result.gan.loss.detach()) == pytest.approx(1.6599731, abs=1e-6)
    result.backward()
    grad = critic.logits.grad * 100
    p = 1 / (1 + np.exp(-critic.logits.detach().numpy()))
    np.testing.assert_allclose(grad.numpy(), np.concatenate([p[:3], p[3:] - 1]) / 3, rtol=1e-5)


def test_r1_of_a_vanishing_move_is_exactly_zero():
    train = Train(r1_weight=100.0, r1_sigma=1e-30)
    result, seen, _ = seen_by(critic_of(), train)
    assert torch.equal(seen["x"][10:15], seen["x"][15:])
    assert float(result.gan.r1) == 0.0
    without, _, _ = seen_by(critic_of(), Train())
    torch.testing.assert_close(result.gan.loss, without.gan.loss, rtol=1e-6, atol=0)


def test_r1_moves_the_noised_sample_at_its_own_level_and_condition():
    result, seen, logits = seen_by(critic_of(), Train(r1_weight=1.0, r1_sigma=0.1))
    move = seen["x"][15:] - seen["x"][10:15]
    assert 0.08 < float(move[seen["sigma"][15:] < 10].std()) < 0.12
    assert torch.equal(seen["sigma"][15:], seen["sigma"][10:15])
    assert torch.equal(seen["label"][15:], seen["label"][10:15])
    by_hand = (logits[10:] - logits[5:10]).double().square().mean()
    assert result.gan.r1.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_critic_weight_is_edms():
    sigma = np.array([0.002, 0.1, 1.0, 80.0])
    edm = (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2
    found = losses.critic_weight(torch.from_numpy(sigma), 0.5).numpy()
    np.testing.assert_allclose(found, edm, rtol=1e-12)
    assert found[0] == pytest.approx(2.5e5, rel=1e-4)


def test_critic_weight_without_data_scale_is_the_epsilon_loss():
    alpha_bar = torch.tensor([0.99915, 0.5, 0.0046601], dtype=torch.float64)
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    x0, eps = images(3).double(), images(3, 11).double()
    x0_hat = x0 + 0.1 * images(3, 12).double()
    x_ddpm = alpha_bar.sqrt().view(-1, 1, 1, 1) * add_noise(x0, sigma, eps)
    root = (1 - alpha_bar).sqrt().view(-1, 1, 1, 1)
    eps_hat = (x_ddpm - alpha_bar.sqrt().view(-1, 1, 1, 1) * x0_hat) / root
    epsilon_loss = (eps_hat - eps).square().mean()
    weight = losses.critic_weight(sigma, None).view(-1, 1, 1, 1)
    torch.testing.assert_close((weight * (x0_hat - x0).square()).mean(), epsilon_loss, rtol=1e-12, atol=0)


def test_without_a_gan_no_data_is_requested_and_no_head_exists():
    critic = critic_of(num_taps=0)
    assert len(critic.heads) == 0

    def never() -> Any:
        raise AssertionError("data was requested")

    result = critic_turn(critic, Train(gan_generator_weight=0, gan_critic_weight=0), never)
    assert result.gan is None
    assert len(result.outputs) == 1
    with pytest.raises(ValueError, match="without a realism head"):
        critic(images(2), torch.ones(2), labels(2), num_denoise=0, logits_from=0)


@pytest.mark.parametrize(("shape", "num"), [((768, 8, 8), 18_879_745), ((1280, 8, 8), 52_437_761)])
def test_head_has_the_published_size_and_names(shape: tuple[int, int, int], num: int):
    with torch.device("meta"):
        head = RealismHead(shape)
    assert sum(p.numel() for p in head.parameters()) == num
    assert list(head.state_dict()) == [f"{i}.{kind}" for i in (0, 1, 3, 4, 6) for kind in ("weight", "bias")]


def test_head_of_32_pixel_features_has_the_published_size():
    with torch.device("meta"):
        head = RealismHead((1280, 32, 32))
    assert sum(p.numel() for p in head.parameters()) == 104_874_241


@pytest.mark.parametrize("shape", [(8, 4, 4), (8, 16, 16), (18, 8, 8), (3, 4, 4)])
def test_head_gives_a_logit_per_sample_for_any_size(shape: tuple[int, int, int]):
    features = torch.randn(3, *shape, generator=rng())
    assert RealismHead(shape)(features).shape == (3,)


@pytest.mark.parametrize("shape", [(8, 4, 8), (8, 6, 6), (8, 2, 2)])
def test_head_refuses_features_it_cannot_halve_to_four(shape: tuple[int, int, int]):
    with pytest.raises(UserError, match="square features"):
        RealismHead(shape)
