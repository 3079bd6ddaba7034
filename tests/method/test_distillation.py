"""One iteration of DMD2: what moves when, on which images, and with which gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor
from toy import NUM_CLASSES, SHAPE, labels, recorded, rng, toy_teacher

from dmd2.config import Train
from dmd2.errors import UserError
from dmd2.method import losses
from dmd2.method.distillation import Distillation

NO_GAN: dict[str, Any] = {"gan_generator_weight": 0, "gan_critic_weight": 0}
QUICK: dict[str, Any] = {
    "batch_size": 6,
    "num_snapshots": 1,
    "warmup_iterations": 0,
    "generator_learning_rate": 1e-3,
    "critic_learning_rate": 1e-3,
}


def data(index: int) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.randn(6, *SHAPE, generator=rng(100 + index)), labels(6)


def pairs(index: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    noise, x0 = (torch.randn(6, *SHAPE, generator=rng(seed + index)) for seed in (200, 300))
    return noise, x0, labels(6)


def distillation(teacher: Any = None, start: Any = None, **keys: Any) -> Distillation:
    train = Train(**{**QUICK, **keys})
    run = Distillation(teacher or toy_teacher(), train, data=data, pairs=pairs, start=start)
    with torch.no_grad():  # away from the teacher, so that no term is 0
        for p in run.critic.fake.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=rng(p.numel())))
    return run


def weights(network: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()]).clone()


@pytest.mark.parametrize(("ratio", "num"), [(5, 11), (1, 3)])
def test_generator_moves_on_every_rth_iteration_and_critic_on_each(ratio: int, num: int):
    run = distillation(critic_steps_per_generator=ratio)
    moved, critic_moved = [], []
    for index in range(num):
        before = weights(run.generator), weights(run.critic.fake), weights(run.critic.heads)
        run.step(index)
        after = weights(run.generator), weights(run.critic.fake), weights(run.critic.heads)
        moved += [index] if not torch.equal(before[0], after[0]) else []
        critic_moved += [index] if not any(map(torch.equal, before[1:], after[1:])) else []
    assert moved == list(range(0, num, ratio))
    assert critic_moved == list(range(num))


def test_critic_trains_on_the_images_made_before_the_generators_update(monkeypatch: pytest.MonkeyPatch):
    run = distillation()
    start = weights(run.generator)
    seen: dict[str, Any] = {}
    original = losses.critic_losses

    def spy(x0: Tensor, cond: Any, *rest: Any) -> Any:
        seen.update(x0=x0, cond=cond, moved=not torch.equal(start, weights(run.generator)))
        return original(x0, cond, *rest)

    monkeypatch.setattr(losses, "critic_losses", spy)
    with recorded(run.generator) as calls:
        run.step(0)
    (made,) = calls
    assert seen["moved"], "the generator's turn comes first"
    assert torch.equal(seen["x0"], made.output.detach())
    assert torch.equal(seen["cond"]["label"], made.cond["label"])
    assert not seen["x0"].requires_grad
    with torch.no_grad():
        again = run.generator(made.x, made.sigma, made.cond)
    assert not torch.equal(again, seen["x0"])


def test_one_step_student_starts_from_noise_of_scale_80_with_uniform_labels():
    run = distillation(batch_size=600, **NO_GAN)
    with recorded(run.generator) as calls:
        run.step(1)
    assert torch.equal(calls[0].sigma, run.teacher.grid.sigmas[-1].expand(600))
    assert float(calls[0].x.std()) == pytest.approx(80.0, rel=0.03)
    counts = torch.bincount(calls[0].cond["label"], minlength=NUM_CLASSES)
    assert int(counts.min()) > 150


def test_each_turn_gives_gradient_to_its_own_network_alone():
    run = distillation()
    seen = {}

    def watch(name: str, descent: Any) -> None:
        step = descent.step

        def spy(*arguments: Any) -> Tensor:
            networks = {"generator": run.generator, "critic": run.critic, "teacher": run.teacher.denoiser}
            seen[name] = {n for n, net in networks.items() if any(p.grad is not None for p in net.parameters())}
            assert all(p.grad is not None for p in networks[name].parameters())
            return step(*arguments)

        descent.step = spy

    watch("generator", run._generator_optimizer)
    watch("critic", run._critic_optimizer)
    frozen = weights(run.teacher.denoiser)
    run.step(0)
    assert seen == {"generator": {"generator"}, "critic": {"critic"}}
    assert torch.equal(frozen, weights(run.teacher.denoiser))
    assert not any(p.requires_grad for p in run.teacher.denoiser.parameters())
    assert all(p.grad is None for net in (run.generator, run.critic) for p in net.parameters())


def generator_gradient(run: Distillation) -> Tensor:
    """The gradient that iteration 0 brings to the generator's optimizer."""
    found = []
    step = run._generator_optimizer.step

    def spy(*arguments: Any) -> Tensor:
        found.append(torch.cat([p.grad.flatten() for p in run.generator.parameters()]).double())
        return step(*arguments)

    run._generator_optimizer.step = spy  # type: ignore[method-assign]
    run.step(0)
    return found[0]


def test_regression_adds_its_weight_times_the_gradient_of_the_squared_error():
    plain = generator_gradient(distillation(**NO_GAN))
    run = distillation(regression_weight=0.25, **NO_GAN)
    noise, target, cond = pairs(0)
    x0 = run.teacher.copy_network()(80 * noise, run.teacher.grid.sigmas[-1].expand(6), cond)
    mse = ((x0 - target) ** 2).mean()
    network = run.teacher.copy_network()
    x0 = network(80 * noise, run.teacher.grid.sigmas[-1].expand(6), cond)
    slope = torch.autograd.grad(((x0 - target) ** 2).mean(), list(network.parameters()))
    by_hand = torch.cat([g.flatten() for g in slope]).double()
    found = generator_gradient(run)
    torch.testing.assert_close(found - plain, 0.25 * by_hand, rtol=1e-4, atol=1e-7)
    assert float(distillation(regression_weight=0.25, **NO_GAN).step(0)["regression_loss"]) == pytest.approx(
        float(mse.detach()), rel=1e-5
    )


def test_regression_goes_by_the_distance_that_it_is_given():
    requested = []

    def distance(x0: Tensor, target: Tensor) -> Tensor:
        requested.append((x0, target))
        return (x0 - target).abs().mean()

    train = Train(**{**QUICK, **NO_GAN, "regression_weight": 0.25})
    run = Distillation(toy_teacher(), train, pairs=pairs, regression_distance=distance)
    metrics = run.step(0)
    ((x0, target),) = requested
    assert torch.equal(target, pairs(0)[1])
    assert x0.requires_grad
    assert float(metrics["regression_loss"]) == float((x0 - target).abs().mean().detach())


def test_weights_scale_matching_and_gan_terms():
    def gradient(matching: float, gan: float) -> Tensor:
        gan_keys = {"gan_generator_weight": gan, "gan_critic_weight": 1e-2} if gan else NO_GAN
        return generator_gradient(distillation(matching_weight=matching, **gan_keys))

    matching = gradient(1.0, 0.0)
    share = gradient(1.0, 1.0) - matching
    torch.testing.assert_close(gradient(1.0, 4.0), matching + 4 * share, rtol=1e-4, atol=1e-5 * float(share.norm()))
    torch.testing.assert_close(gradient(3.0, 0.0), 3 * matching, rtol=1e-5, atol=1e-8)
    assert float(share.norm()) > 0


def test_gan_to_matching_ratio_is_of_the_weighted_gradients_on_the_images():
    low, high = (distillation(gan_generator_weight=w).step(0)["gan_to_matching_ratio"] for w in (0.01, 0.04))
    assert float(high) == pytest.approx(4 * float(low), rel=1e-4)


def test_gan_alone_asks_no_teacher_but_trains_the_fake_score():
    run = distillation(matching_weight=0, critic_steps_per_generator=1)
    decoder = weights(run.critic.fake.decoder)
    with recorded(run.teacher.denoiser) as calls:
        metrics = run.step(0)
    assert calls == []
    assert "matching_loss" not in metrics
    assert "gan_to_matching_ratio" not in metrics
    assert float(metrics["denoising_loss"]) > 0
    assert not torch.equal(decoder, weights(run.critic.fake.decoder))


def test_average_counts_generator_updates_with_its_ramp():
    run = distillation(ema_decay=0.3, critic_steps_per_generator=2)
    mean = weights(run.generator).double()
    num_updates = 0
    for index in range(9):
        run.step(index)
        if index % 2 == 0:
            decay = min(0.3, (1 + num_updates) / (10 + num_updates))
            mean = decay * mean + (1 - decay) * weights(run.generator).double()
            num_updates += 1
    assert num_updates == 5
    names = [name for name, _ in run.generator.named_parameters()]
    exported = torch.cat([run.export()[name].flatten() for name in names]).double()
    torch.testing.assert_close(exported, mean, rtol=1e-5, atol=1e-7)


def test_without_an_average_the_generator_itself_is_exported():
    run = distillation()
    run.step(0)
    for name, value in run.generator.state_dict().items():
        assert torch.equal(run.export()[name], value)


def test_a_step_is_a_function_of_seed_index_and_networks():
    first, second = distillation(num_steps=4), distillation(num_steps=4)
    for index in range(4):
        one = first.step(index)
        torch.manual_seed(index)
        torch.randn(17)
        other = second.step(index)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(weights(first.generator), weights(second.generator))
    reseeded = distillation(num_steps=4, seed=11)
    reseeded.step(0)
    assert not torch.equal(weights(reseeded.critic), weights(first.critic))


def test_dropout_of_the_teachers_network_takes_no_part():
    first, second = (distillation(toy_teacher(dropout=0.5)) for _ in range(2))
    torch.manual_seed(1)
    one = first.step(0)
    torch.manual_seed(2)
    other = second.step(0)
    assert float(one["denoising_loss"]) == float(other["denoising_loss"])
    assert float(one["generator_grad_norm"]) == float(other["generator_grad_norm"])


def test_run_goes_on_from_networks_of_another_with_a_fresh_head_and_optimizers():
    before = distillation(**NO_GAN)
    for index in range(3):
        before.step(index)
    after = Distillation(toy_teacher(), Train(**QUICK), data=data, start=before.networks())
    assert torch.equal(weights(after.generator), weights(before.generator))
    assert torch.equal(weights(after.critic.fake), weights(before.critic.fake))
    fresh = Distillation(toy_teacher(), Train(**QUICK), data=data)
    assert torch.equal(weights(after.critic.heads), weights(fresh.critic.heads))
    assert not after.state_dict()["generator_optimizer"]["steps"].any()
    start_average = torch.cat([v.flatten() for v in after.export().values()])
    assert torch.equal(start_average, torch.cat([v.flatten() for v in before.generator.state_dict().values()]))


def test_generator_and_fake_score_start_as_the_teacher():
    run = Distillation(toy_teacher(), Train(**QUICK), data=data)
    assert torch.equal(weights(run.generator), weights(run.teacher.denoiser))
    assert torch.equal(weights(run.critic.fake), weights(run.teacher.denoiser))


@pytest.mark.parametrize(
    ("keys", "given", "message"),
    [
        ({}, {"pairs": pairs}, "real data"),
        ({"num_steps": 2, "backward_simulation": False, **NO_GAN}, {}, "real data"),
        ({"regression_weight": 0.1}, {"data": data}, "noise-image pairs"),
        ({"guidance_scale": 1.75}, {"data": data}, r"guidance_scale is 1\.75.*unconditional"),
    ],
)
def test_a_run_without_what_its_terms_need_is_refused(keys: dict[str, Any], given: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        Distillation(toy_teacher(), Train(**{**QUICK, **keys}), **given)


def test_critic_lag_is_read_right_after_and_right_before_an_update():
    run = distillation(critic_steps_per_generator=3)
    names = [set(run.step(index)) for index in range(6)]
    after = [i for i, found in enumerate(names) if "denoising_loss_after_update" in found]
    before = [i for i, found in enumerate(names) if "denoising_loss_before_update" in found]
    assert (after, before) == ([1, 4], [0, 3])
