"""The update against torch's own clip and AdamW, schedules against their formulas, and the guard against NaN."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import assert_equal

from dmd2.errors import UserError
from dmd2.training.optimizer import EMA, FiniteGuard, Optimizer, warmup, warmup_decay

CPU = torch.device("cpu")


def parameters() -> list[nn.Parameter]:
    rng = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=rng)) for shape in ((3, 4), (5,), ())]


def gradients(index: int, size: float) -> list[Tensor]:
    rng = torch.Generator().manual_seed(100 + index)
    return [size * torch.randn(p.shape, generator=rng) for p in parameters()]


def descent(params: list[nn.Parameter], **keys: Any) -> Optimizer:
    usual = {"learning_rate": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1, "grad_clip": 2.0, "rate": warmup(4)}
    return Optimizer(nn.ParameterList(params), **{**usual, **keys})


def update(moved: Optimizer, index: int, grads: list[Tensor], guard: FiniteGuard, **terms: Tensor) -> Tensor:
    for p, grad in zip(moved.params, grads, strict=True):
        p.grad = grad.clone()
    return moved.step(index, guard, terms, "grad_norm")


def test_update_equals_torchs_clip_and_adamw_in_float64():
    params, guard = parameters(), FiniteGuard(CPU)
    ours = descent(params)
    double = [nn.Parameter(p.detach().double()) for p in params]
    theirs = torch.optim.AdamW(double, betas=(0.9, 0.99), weight_decay=0.1, eps=1e-8)
    norms = []
    for index, size in enumerate([0.1, 5.0, 100.0, 0.3, 1e-3, 2.0]):  # below the clip and above it
        grads = gradients(index, size)
        norm = update(ours, index, grads, guard)
        for p, grad in zip(double, grads, strict=True):
            p.grad = grad.double()
        expected = nn.utils.clip_grad_norm_(double, 2.0)
        theirs.param_groups[0]["lr"] = 0.01 * min(1.0, (index + 1) / 4)
        theirs.step()
        assert float(norm) == pytest.approx(float(expected), rel=1e-6), "the norm before the clip"
        norms.append(float(norm))
        for p, q in zip(params, double, strict=True):
            torch.testing.assert_close(p.detach().double(), q.detach(), rtol=1e-5, atol=1e-7)
            assert p.grad is None
    assert min(norms) < 2 < max(norms)


def test_weight_decay_is_decoupled():
    p = nn.Parameter(torch.tensor([2.0]))
    update(descent([p], rate=warmup(0)), 0, [torch.zeros(1)], FiniteGuard(CPU))
    assert p.item() == pytest.approx(2.0 * (1 - 0.01 * 0.1), rel=1e-6)


def test_warmup_rises_linearly_and_stays():
    assert [warmup(4)(index) for index in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warmup(0)(0) == 1.0


def test_warmup_decay_falls_linearly_to_its_end():
    rate = warmup_decay(10, 100, 0.5, 0.02)
    assert rate(0) == pytest.approx(0.1)
    assert {rate(index) for index in range(9, 51)} == {1.0}
    assert rate(75) == pytest.approx((1 + 0.02) / 2)
    assert rate(100) == pytest.approx(0.02)
    falls = [rate(index) - rate(index + 1) for index in range(50, 100)]
    assert falls == pytest.approx([0.98 / 50] * 50)
    assert warmup_decay(0, 100, 1.0, 0.02)(99) == 1.0, "no decay"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["term", "gradient"])
def test_update_with_a_bad_term_or_gradient_is_not_made(bad: float, where: str):
    params, guard = parameters(), FiniteGuard(CPU)
    moved = descent(params)
    update(moved, 0, gradients(0, 1.0), guard, loss=torch.tensor(0.5))
    guard.raise_if_tripped()
    before = [p.detach().clone() for p in params]
    state = copy.deepcopy(moved.state_dict())
    grads = gradients(1, 1.0)
    if where == "gradient":
        grads[1][2] = bad
    update(moved, 1, grads, guard, loss=torch.tensor(bad if where == "term" else 0.5), other=torch.tensor(1.0))
    update(moved, 2, gradients(2, 1.0), guard, loss=torch.tensor(0.5), other=torch.tensor(float("nan")))
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    now = moved.state_dict()
    assert_equal(now, state)
    name = "loss" if where == "term" else "grad_norm"
    with pytest.raises(UserError, match=rf"^step 2: {name} not finite; .*last checkpoint") as error:
        guard.raise_if_tripped()
    assert "other" not in str(error.value), "only the first bad step counts"
    assert "\n" not in str(error.value)


def test_guard_names_every_bad_term_of_the_first_bad_step():
    guard = FiniteGuard(CPU)
    guard.watch(0, {"a": torch.tensor(1.0), "b": torch.tensor(2.0)})
    guard.watch(4, {"a": torch.tensor(float("nan")), "b": torch.tensor(float("inf")), "c": torch.tensor(0.0)})
    guard.watch(5, {"c": torch.tensor(float("nan")), "d": torch.tensor(float("nan"))})
    with pytest.raises(UserError, match=r"^step 5: a, b not finite"):
        guard.raise_if_tripped()


def test_two_networks_share_a_guard():
    guard = FiniteGuard(CPU)
    one, two = [nn.Parameter(torch.ones(2))], [nn.Parameter(torch.ones(2))]
    update(descent(one), 0, [torch.full((2,), float("nan"))], guard)
    update(descent(two), 0, [torch.ones(2)], guard)
    assert torch.equal(two[0], torch.ones(2)), "once one turn went wrong, the other's network stands still too"


def test_optimizer_and_average_go_on_from_their_state():
    params = parameters()
    network = nn.ParameterList(params)
    moved, average, guard = descent(params), EMA(network, 0.5), FiniteGuard(CPU)
    for index in range(3):
        update(moved, index, gradients(index, 1.0), guard)
        average.update()
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    other, other_average = descent(copies), EMA(nn.ParameterList(copies), 0.5)
    other.load_state_dict(copy.deepcopy(moved.state_dict()))
    other_average.load_state_dict(copy.deepcopy(average.state_dict()))
    for index in range(3, 6):
        for each, mean in ((moved, average), (other, other_average)):
            update(each, index, gradients(index, 1.0), guard)
            mean.update()
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))
    assert_equal(average.state_dict(), other_average.state_dict())


def test_average_follows_its_formula_and_keeps_buffers():
    network = nn.BatchNorm1d(2)
    average = EMA(network, 0.8)
    mean = network.weight.detach().double().clone()
    for num in range(50):
        with torch.no_grad():
            network.weight.add_(torch.tensor([1.0, -2.0]))
        average.update()
        decay = min(0.8, (1 + num) / (10 + num))
        mean = decay * mean + (1 - decay) * network.weight.detach().double()
    torch.testing.assert_close(average.weights()["weight"].double(), mean, rtol=1e-5, atol=1e-6)
    assert average.weights().keys() == network.state_dict().keys()
    assert average.state_dict()["num_updates"] == 50


def test_state_of_another_network_is_refused():
    moved, other = descent(parameters()), descent(parameters()[:2])
    with pytest.raises(ValueError, match="other parameters than the network's"):
        moved.load_state_dict(other.state_dict())
    average, another = EMA(nn.Linear(2, 2), 0.5), EMA(nn.Linear(2, 2, bias=False), 0.5)
    with pytest.raises(ValueError, match="other tensors than the network's"):
        average.load_state_dict(another.state_dict())


def test_state_is_complete_before_the_first_update():
    moved = descent(parameters())
    before = copy.deepcopy(moved.state_dict())
    update(moved, 0, gradients(0, 1.0), FiniteGuard(CPU))
    after = moved.state_dict()
    assert before.keys() == after.keys()
    assert before["exp_avg"].keys() == after["exp_avg"].keys()
    assert float(before["steps"].sum()) == 0
    assert after["steps"].tolist() == [1.0] * 3
