"""Gradients summed over parts of a batch: the same step, whatever passes the networks at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor
from toy import SHAPE, labels, recorded, rng, toy_teacher

from dmd2.config import TeacherTraining, Train
from dmd2.errors import UserError
from dmd2.method import losses
from dmd2.method.distillation import Distillation
from dmd2.method.teacher_fit import TeacherFit
from dmd2.training.micro_batches import BatchReader, MicroBatches
from dmd2.training.optimizer import Optimizer
from dmd2.training.rng import step_rng

BATCH = 6
KEYS: dict[str, Any] = {"num_snapshots": 1, "warmup_iterations": 0, "regression_weight": 0.25}
CPU = torch.device("cpu")


def data(index: int) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.randn(BATCH, *SHAPE, generator=rng(100 + index)), labels(BATCH)


def pairs(index: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    noise, x0 = (torch.randn(BATCH, *SHAPE, generator=rng(seed + index)) for seed in (200, 300))
    return noise, x0, labels(BATCH)


def part_of(batches: Any, number: int, num: int) -> Any:
    """The batches of one of `num` ranks."""

    def cut(item: Any) -> Any:
        return item.chunk(num)[number] if isinstance(item, Tensor) else {k: cut(v) for k, v in item.items()}

    return lambda index: tuple(cut(item) for item in batches(index))


def away_from_the_teacher(run: Distillation) -> Distillation:
    with torch.no_grad():  # so that no term is 0
        for p in run.critic.fake.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=rng(p.numel())))
    return run


def whole(micro_batch_size: int | None, **keys: Any) -> Distillation:
    train = Train(batch_size=BATCH, **{**KEYS, **keys})
    run = Distillation(toy_teacher(), train, data=data, pairs=pairs, micro_batch_size=micro_batch_size)
    return away_from_the_teacher(run)


def one_slot(number: int, num: int, **keys: Any) -> Distillation:
    """A run of one of `num` slots alone, to be stepped as the rank of that number."""
    train = Train(batch_size=BATCH // num, **{**KEYS, **keys})
    given = {"data": part_of(data, number, num), "pairs": part_of(pairs, number, num)}
    return away_from_the_teacher(Distillation(toy_teacher(), train, **given))


def gradients(run: Any, index: int, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What iteration `index` brings to each optimizer, and what it logs. No weight moves."""
    found: dict[str, Tensor] = {}

    def spy(self: Optimizer, index: int, guard: Any, terms: Any, name: str) -> Tensor:
        found[name] = torch.cat([p.grad.flatten() for p in self.params]).double()
        for p in self.params:
            p.grad = None
        return found[name].norm().float()

    with monkeypatch.context() as patch:
        patch.setattr(Optimizer, "step", spy)
        metrics = run.step(index)
    return found, metrics


SWITCHES: list[dict[str, Any]] = [
    {},
    {"num_steps": 4},
    {"num_steps": 4, "backward_simulation": False},
    {"share_levels": True, "matching_levels": (0, 999), "share_critic_pass": True},
    {"gan_features": "teacher", "r1_weight": 1.0},
]


@pytest.mark.parametrize("keys", SWITCHES)
@pytest.mark.parametrize("num", [2, 3])
def test_gradients_are_the_means_of_those_of_single_slots(
    keys: dict[str, Any], num: int, monkeypatch: pytest.MonkeyPatch
):
    found, metrics = gradients(whole(BATCH // num, **keys), 0, monkeypatch)
    alone = []
    for slot in range(num):
        monkeypatch.setenv("RANK", str(slot))
        alone.append(gradients(one_slot(slot, num, **keys), 0, monkeypatch))
    assert set(found) == {"generator_grad_norm", "critic_grad_norm"}
    for name, grad in found.items():
        truth = torch.stack([grads[name] for grads, _ in alone]).mean(0)
        assert float(truth.norm()) > 1e-4
        assert float((grad - truth).norm()) < 1e-6 * float(truth.norm()), name
        assert float((alone[0][0][name] - truth).norm()) > 1e-2 * float(truth.norm()), "slots draw the same"
    for name in set(metrics) - set(found):
        mean = sum(float(logged[name]) for _, logged in alone) / num
        assert float(metrics[name]) == pytest.approx(mean, rel=1e-5), name


def test_one_part_of_the_whole_share_is_the_run_without_a_limit():
    limited, free = whole(BATCH), whole(None)
    for index in range(3):
        one, other = limited.step(index), free.step(index)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(map(torch.equal, limited.networks().values(), free.networks().values()))


def test_all_parts_are_made_before_the_one_update_and_each_network_moves_once(monkeypatch: pytest.MonkeyPatch):
    run = whole(2)
    order: list[str] = []
    seen: list[Tensor] = []
    judge, step = losses.critic_losses, Optimizer.step

    def critic_losses(x0: Tensor, *rest: Any) -> Any:
        order.append("critic")
        seen.append(x0)
        return judge(x0, *rest)

    def moved(self: Optimizer, index: int, guard: Any, terms: Any, name: str) -> Tensor:
        order.append(name)
        return step(self, index, guard, terms, name)

    monkeypatch.setattr(losses, "critic_losses", critic_losses)
    monkeypatch.setattr(Optimizer, "step", moved)
    with recorded(run.generator) as calls:
        run.step(0)
    made = [call.output.detach() for call in calls if call.output.requires_grad][::2]  # every other is of pairs
    assert order == ["generator_grad_norm", "critic", "critic", "critic", "critic_grad_norm"]
    assert len(seen) == 3
    assert all(map(torch.equal, seen, made))


@pytest.mark.parametrize(("regression", "flags"), [(0.0, [False, False, True]), (0.25, [*[False] * 5, True])])
def test_ranks_exchange_gradients_in_the_last_backward_pass_alone(
    regression: float, flags: list[bool], monkeypatch: pytest.MonkeyPatch
):
    run = whole(2, regression_weight=regression)
    requested: dict[str, list[bool]] = {"generator": [], "critic": []}
    for name, descent in (("generator", run._generator_optimizer), ("critic", run._critic_optimizer)):
        block = descent.accumulating

        def spy(*, last: bool, name: str = name, block: Any = block) -> Any:
            requested[name].append(last)
            return block(last=last)

        monkeypatch.setattr(descent, "accumulating", spy)
    run.step(0)
    assert requested == {"generator": flags, "critic": [False, False, True]}


@pytest.mark.parametrize("turns", ["both", "disjoint"])
def test_average_counts_updates_of_the_generator_and_not_parts_or_critic_steps(turns: str):
    run = whole(2, turns=turns, critic_steps_per_generator=3, ema_decay=0.9)
    for index in range(7):
        run.step(index)
    assert run.ema.state_dict()["num_updates"] == 3


def test_slots_have_the_same_samples_and_random_numbers_on_any_number_of_ranks(monkeypatch: pytest.MonkeyPatch):
    def slots(world: int, num_parts: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        found = []
        monkeypatch.setenv("WORLD_SIZE", str(world))
        for rank in range(world):
            monkeypatch.setenv("RANK", str(rank))
            parts = MicroBatches.of(24, 24 // (world * num_parts))
            assert parts == MicroBatches(num_parts, 24 // (world * num_parts))
            ids = torch.arange(24).chunk(world)[rank]
            share = BatchReader(lambda step, ids=ids: (ids + 1000 * step, {"label": ids}), parts, CPU)
            for part in range(parts.num):
                x0, cond = share(5, part)
                found.append((x0, cond["label"], torch.randn(3, generator=parts.rng(1, 5, part, CPU))))
        return found

    truth = slots(4, 1)
    assert torch.equal(torch.cat([x0 for x0, _, _ in truth]), torch.arange(24) + 5000)
    for number, (_, _, drawn) in enumerate(truth):
        assert torch.equal(drawn, torch.randn(3, generator=step_rng(1, 5, number)))
    for world, num_parts in ((2, 2), (1, 4)):
        for one, other in zip(slots(world, num_parts), truth, strict=True):
            assert all(map(torch.equal, one, other))


def test_batches_are_read_once_a_step_and_must_be_a_ranks_share():
    requested: list[int] = []

    def batches(index: int) -> tuple[Tensor, dict[str, Tensor]]:
        requested.append(index)
        return data(index)

    share = BatchReader(batches, MicroBatches(3, 2), CPU)
    for step in (4, 5):
        for part in range(3):
            share(step, part)
    assert requested == [4, 5]
    with pytest.raises(ValueError, match="batch 0 has 6 samples"):
        BatchReader(batches, MicroBatches(2, 2), CPU)(0, 0)


@pytest.mark.parametrize(
    ("world", "batch_size", "micro", "parts"),
    [
        (1, 280, 48, (7, 40)),
        (7, 280, 16, (4, 10)),
        (8, 280, 20, (5, 7)),
        (8, 336, 20, (3, 14)),
        (8, 512, 20, (4, 16)),
        (8, 280, 40, (1, 35)),
        (8, 280, None, (1, 35)),
        (8, 280, 1, (35, 1)),
    ],
)
def test_a_share_is_cut_into_the_fewest_equal_parts_within_the_limit(
    world: int, batch_size: int, micro: int | None, parts: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    assert MicroBatches.of(batch_size, micro) == MicroBatches(*parts)


def test_a_batch_that_the_ranks_do_not_divide_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(UserError, match="batch_size 286 is not divisible by 8 ranks; use 280 or 288"):
        MicroBatches.of(286, 16)


def test_teachers_gradient_too_is_the_mean_of_those_of_single_slots(monkeypatch: pytest.MonkeyPatch):
    def fit(num: int, batches: Any, micro: int | None = None) -> TeacherFit:
        training = TeacherTraining(iterations=10, batch_size=BATCH // num)
        return TeacherFit(toy_teacher(dropout=0.5), training, batches, micro_batch_size=micro)

    found, metrics = gradients(fit(1, data, micro=2), 3, monkeypatch)
    alone = []
    for slot in range(3):
        monkeypatch.setenv("RANK", str(slot))
        alone.append(gradients(fit(3, part_of(data, slot, 3)), 3, monkeypatch))
    truth = torch.stack([grads["grad_norm"] for grads, _ in alone]).mean(0)
    assert float((found["grad_norm"] - truth).norm()) < 1e-6 * float(truth.norm())
    mean = sum(float(logged["denoising_loss"]) for _, logged in alone) / 3
    assert float(metrics["denoising_loss"]) == pytest.approx(mean, rel=1e-5)
