"""The switches of known deviations from the paper: what each changes in a step, and what it leaves as it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import SHAPE, Call, labels, rng, toy_teacher

from dmd2.config import Train
from dmd2.errors import UserError
from dmd2.method import losses
from dmd2.method.distillation import Distillation
from dmd2.method.noise import NoiseGrid

BATCH = 6
LEVELS = {"matching_levels": (0, 999)}


def data(index: int) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.randn(BATCH, *SHAPE, generator=rng(100 + index)), labels(BATCH)


def distillation(levels: int = 1, **keys: Any) -> Distillation:
    train = Train(**{"batch_size": BATCH, "num_snapshots": 1, "warmup_iterations": 0, **keys})
    run = Distillation(toy_teacher(levels=levels, guidable=train.guidance_scale != 1), train, data=data)
    with torch.no_grad():  # away from the teacher, so that no term is 0
        for p in run.critic.fake.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=rng(p.numel())))
    return run


def weights(network: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()]).clone()


class Passes:
    """How many samples the encoder and the decoder of each network were given, pass by pass."""

    def __init__(self) -> None:
        self.encoder: dict[str, list[int]] = {}
        self.decoder: dict[str, list[int]] = {}


@contextmanager
def counted(run: Distillation) -> Iterator[Passes]:
    found, handles = Passes(), []
    for name, network in (("generator", run.generator), ("fake", run.critic.fake), ("real", run.teacher.denoiser)):
        for log, part in ((found.encoder, network.encoder), (found.decoder, network.decoder)):
            sizes = log.setdefault(name, [])
            note = lambda _, inputs, __, sizes=sizes: sizes.append(len(inputs[0])) if len(inputs[0]) else None  # noqa: E731
            handles.append(part.register_forward_hook(note))
    yield found
    for handle in handles:
        handle.remove()


@contextmanager
def requested(network: nn.Module) -> Iterator[list[Call]]:
    """The questions that reach a network's `denoise_and_tap`."""
    calls: list[Call] = []
    original = network.denoise_and_tap

    def spy(*inputs: Any, **options: Any) -> Any:
        answer = original(*inputs, **options)
        calls.append(Call(inputs, answer[0]))
        return answer

    network.denoise_and_tap = spy
    yield calls
    del network.denoise_and_tap


def test_paper_takes_these_passes():
    run = distillation()
    with counted(run) as passes:
        run.step(0)
    assert passes.encoder == {"generator": [6], "fake": [6, 6, 18], "real": [6]}
    assert passes.decoder == {"generator": [6], "fake": [6, 6], "real": [6]}


def test_share_levels_asks_matching_and_gan_about_one_noised_sample_in_one_pass():
    def generator_turn(**keys: Any) -> tuple[Passes, list[Call], list[Call]]:
        run = distillation(**LEVELS, **keys)
        with counted(run) as passes, requested(run.teacher.denoiser) as real, requested(run.critic.fake) as fake:
            run.step(0)
        return passes, real, fake

    separate, real, fake = generator_turn()
    assert torch.equal(real[0].x, fake[0].x)
    assert not torch.equal(fake[0].x, fake[1].x)
    assert not torch.equal(fake[0].sigma, fake[1].sigma)
    assert separate.encoder["fake"] == [6, 6, 18]

    shared, real, fake = generator_turn(share_levels=True)
    assert torch.equal(real[0].x, fake[0].x)
    assert torch.equal(real[0].sigma, fake[0].sigma)
    assert shared.encoder == {"generator": [6], "fake": [6, 18], "real": [6]}, "one encoder pass less"
    assert shared.decoder == separate.decoder
    assert fake[1].x.shape[0] == 18, "the critic's own turn is as it was"


@pytest.mark.parametrize("features", ["critic", "teacher"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_shared_gradients_are_those_of_both_terms_at_that_sample(features: str, scale: float):
    keys = {"gan_features": features, "guidance_scale": scale, **LEVELS}
    run = distillation(**keys)
    x0 = torch.randn(BATCH, *SHAPE, generator=rng(3))
    arguments = (x0, labels(BATCH), run.teacher, run.critic, run.train)
    (matching, matching_grad), (gan, gan_grad) = losses.shared_gradients(*arguments, rng(7))
    truth, truth_grad = losses.matching_gradient(*arguments, rng(7))
    torch.testing.assert_close(matching.loss, truth.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(matching_grad, truth_grad, rtol=1e-5, atol=1e-8)
    truth, truth_grad = losses.gan_gradient(*arguments, rng(7))
    torch.testing.assert_close(gan.loss, truth.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(gan_grad, truth_grad, rtol=1e-5, atol=1e-8)
    assert float(gan_grad.norm()) > 0
    assert not matching_grad.requires_grad
    assert all(p.grad is None for network in (run.critic, run.teacher.denoiser) for p in network.parameters())


def test_disjoint_turns_move_either_network_and_never_both():
    run = distillation(turns="disjoint", critic_steps_per_generator=4)
    moved = []
    for index in range(8):
        before = weights(run.generator), weights(run.critic.fake), weights(run.critic.heads)
        metrics = run.step(index)
        after = weights(run.generator), weights(run.critic.fake), weights(run.critic.heads)
        moved.append(tuple(not torch.equal(*pair) for pair in zip(before, after, strict=True)))
        assert ("generator_grad_norm" in metrics, "critic_grad_norm" in metrics) == moved[-1][:2]
    assert moved == ([(True, False, False)] + [(False, True, True)] * 3) * 2


def test_disjoint_turns_read_the_critics_lag_on_its_first_and_last_update():
    run = distillation(turns="disjoint", critic_steps_per_generator=3)
    names = [set(run.step(index)) for index in range(6)]
    after = [i for i, found in enumerate(names) if "denoising_loss_after_update" in found]
    before = [i for i, found in enumerate(names) if "denoising_loss_before_update" in found]
    assert (after, before) == ([1, 4], [2, 5])


def test_generators_step_of_disjoint_turns_asks_for_no_data():
    run = distillation(turns="disjoint")
    run._data = None
    assert "gan_generator_loss" in run.step(0)
    with pytest.raises(AssertionError):
        run.step(1)


def test_teachers_features_feed_the_discriminator_and_keep_its_gradient_from_the_fake_score():
    run = distillation(gan_features="teacher", critic_steps_per_generator=1)
    assert set(dict(run.critic.named_children())) == {"fake", "heads"}
    with counted(run) as passes:
        run.step(0)
    assert passes.encoder == {"generator": [6], "fake": [6, 6], "real": [6, 6, 12]}
    assert passes.decoder == {"generator": [6], "fake": [6, 6], "real": [6]}

    def critic_gradient(weight: float) -> dict[str, Tensor]:
        run = distillation(gan_features="teacher", gan_critic_weight=weight)
        x0, cond = data(0)
        found = losses.critic_losses(x0, cond, lambda: data(1), run.teacher, run.critic, run.train, rng(4))
        found.backward()
        assert all(p.grad is None for p in run.teacher.denoiser.parameters())
        return {name: p.grad for name, p in run.critic.named_parameters()}

    light, heavy = critic_gradient(0.01), critic_gradient(1.0)
    for name, grad in light.items():
        if name.startswith("fake."):
            assert torch.equal(grad, heavy[name]), name
        else:
            torch.testing.assert_close(100 * grad, heavy[name], rtol=1e-4, atol=1e-7)
    assert any(float(grad.norm()) > 0 for name, grad in light.items() if name.startswith("heads."))


def test_critics_features_let_the_discriminators_gradient_reach_the_fake_scores_encoder():
    def encoder_gradient(weight: float) -> Tensor:
        run = distillation(gan_critic_weight=weight)
        x0, cond = data(0)
        losses.critic_losses(x0, cond, lambda: data(1), run.teacher, run.critic, run.train, rng(4)).backward()
        return run.critic.fake.encoder.weight.grad

    assert not torch.allclose(encoder_gradient(0.01), encoder_gradient(1.0), rtol=1e-3)


def test_gan_gradient_through_the_teachers_features_is_the_difference_quotient():
    run = distillation(gan_features="teacher", gan_levels=(300, 900))
    run.teacher.denoiser.double()
    run.critic.double()
    for head in run.critic.heads:
        head.forward = lambda features, head=head: nn.Sequential.forward(head, features).flatten()  # stay double
    grid = NoiseGrid(run.teacher.grid.sigmas.double(), 80.0)
    x0, direction = (torch.randn(BATCH, *SHAPE, generator=rng(seed)).double() for seed in (3, 4))

    def term(at: Tensor) -> tuple[Tensor, Tensor]:
        object.__setattr__(run.teacher, "grid", grid)
        sums, grad = losses.gan_gradient(at, labels(BATCH), run.teacher, run.critic, run.train, rng(5))
        return sums.loss, grad

    step = 1e-4
    slope = float(term(x0 + step * direction)[0] - term(x0 - step * direction)[0]) / (2 * step)
    assert abs(slope) > 1e-7
    assert float((term(x0)[1] * direction).sum()) == pytest.approx(slope, rel=1e-5)


def test_uniform_denoising_weight_is_the_plain_mean_square():
    run = distillation(denoising_weighting="uniform")
    x0, cond = data(0)
    with requested(run.critic.fake) as calls:
        found = losses.critic_losses(x0, cond, lambda: data(1), run.teacher, run.critic, run.train, rng(4))
    truth = (calls[0].output - x0).double().square().mean()
    torch.testing.assert_close(found.denoising.loss.double(), truth, rtol=1e-5, atol=0)
    weighted = losses.critic_losses(x0, cond, lambda: data(1), run.teacher, run.critic, Train(), rng(4))
    torch.testing.assert_close(weighted.gan.loss, found.gan.loss)
    assert float(weighted.denoising.loss.detach()) > 2 * float(found.denoising.loss.detach())


def test_hinge_is_the_discriminators_margin_and_the_generators_plain_mean():
    run = distillation(gan_loss="hinge")
    logits: list[Tensor] = []
    run.critic.register_forward_hook(lambda _, __, output: logits.append(output[1]))
    x0, cond = data(0)
    found = losses.critic_losses(x0, cond, lambda: data(1), run.teacher, run.critic, run.train, rng(4))
    gen, real = logits[0].chunk(2)
    truth = torch.relu(1 + gen).mean() + torch.relu(1 - real).mean()
    torch.testing.assert_close(found.gan.loss, truth, rtol=1e-6, atol=0)
    loss, _ = losses.gan_gradient(x0, cond, run.teacher, run.critic, run.train, rng(4))
    torch.testing.assert_close(loss.loss, -logits[1].mean(), rtol=1e-6, atol=0)


def test_several_taps_have_a_head_each_whose_logits_count_alike():
    run = distillation(levels=3, gan_taps=3)
    assert [head[0].in_channels for head in run.critic.heads] == [
        shape[0] for shape in run.teacher.denoiser.feature_shapes
    ]
    logits: list[Tensor] = []
    each: list[list[Tensor]] = [[], [], []]
    run.critic.register_forward_hook(lambda _, __, output: logits.append(output[1]))
    for head, found in zip(run.critic.heads, each, strict=True):
        head.register_forward_hook(lambda _, __, output, found=found: found.append(output))
    x0, cond = data(0)
    found = losses.critic_losses(x0, cond, lambda: data(1), run.teacher, run.critic, run.train, rng(4))
    assert torch.equal(logits[0], torch.stack([found[0] for found in each], dim=1))
    gens, reals = zip(*(found[0].double().chunk(2) for found in each), strict=True)
    softplus = nn.functional.softplus
    truth = sum(softplus(gen).mean() + softplus(-real).mean() for gen, real in zip(gens, reals, strict=True)) / 3
    torch.testing.assert_close(found.gan.loss.double(), truth, rtol=1e-5, atol=0)

    loss, _ = losses.gan_gradient(x0, cond, run.teacher, run.critic, run.train, rng(4))
    truth = sum(softplus(-found[1].double()).mean() for found in each) / 3
    torch.testing.assert_close(loss.loss.double(), truth, rtol=1e-5, atol=0)

    run.step(0)
    found.backward()
    assert all(float(p.grad.abs().sum()) > 0 for head in run.critic.heads for p in head[0].parameters())


def test_one_tap_more_than_the_teacher_has_is_refused():
    with pytest.raises(UserError, match=r"gan_taps is 4, but this teacher's encoder has 3 level\(s\); use at most 3"):
        distillation(levels=3, gan_taps=4)


def test_r1_pulls_at_all_heads_on_the_teachers_features_too():
    run = distillation(levels=2, gan_taps=2, gan_features="teacher", r1_weight=2.0, r1_sigma=0.1)
    logits: list[Tensor] = []
    run.critic.register_forward_hook(lambda _, __, output: logits.append(output[1]))
    x0, cond = data(0)
    found = losses.critic_losses(x0, cond, lambda: data(1), run.teacher, run.critic, run.train, rng(4))
    gen, real, moved = logits[0].chunk(3)
    assert float(found.gan.r1.detach()) == pytest.approx(float((moved - real).square().mean().detach()), rel=1e-5)
    assert float(found.gan.r1.detach()) > 0
    softplus = nn.functional.softplus
    truth = softplus(gen).mean() + softplus(-real).mean() + 2 * (moved - real).square().mean()
    torch.testing.assert_close(found.gan.loss, truth, rtol=1e-5, atol=0)


def test_all_of_fastgens_switches_go_together():
    levels = dict.fromkeys(("matching_levels", "critic_levels", "gan_levels"), (2, 998))
    keys = {"turns": "disjoint", "gan_features": "teacher", "gan_taps": 2, "gan_critic_weight": 1.0}
    run = distillation(levels=2, share_levels=True, denoising_weighting="uniform", **keys, **levels)
    seen = []
    for index in range(2):
        with counted(run) as passes:
            run.step(index)
        seen.append((passes.encoder, passes.decoder))
    generators, critics = seen
    assert generators == ({"generator": [6], "fake": [6], "real": [6]},) * 2, "one pass of each network"
    assert critics == (
        {"generator": [6], "fake": [6], "real": [12]},
        {"generator": [6], "fake": [6], "real": []},
    )
