"""FLOPs are those of a count by hand, of a real run, and of the recipe that was released."""

from __future__ import annotations

from pathlib import Path

import pytest
from counted import DATA, DEEP, FLAT, NO_GAN, real_run, train

from dmd2.cost import step_parts
from dmd2.cost.flops import FlopCounter, StepCost, _iterations, features_cost, inception_cost, pass_cost, step_cost
from dmd2.lineage.plan import Plan

PIXELS, C, EMB = 64, 16, 64  # of FLAT: 8x8, its channels, the width of its embedding
WORKFLOW = Path(__file__).parents[2] / "workflow"
IMAGENET = Plan(WORKFLOW, "imagenet64").preset


def conv(num_in: int, num_out: int, kernel: int, pixels: int = PIXELS) -> int:
    return 2 * num_in * num_out * kernel**2 * pixels


def linear(num_in: int, num_out: int) -> int:
    return 2 * num_in * num_out


def block(num_in: int, num_out: int, *, attention: bool = False) -> int:
    """Two 3x3 convolutions, scale and shift from the embedding, a 1x1 skip where the width changes; q, k, v, their two
    products over all pairs of pixels, and the projection."""
    flops = conv(num_in, num_out, 3) + conv(num_out, num_out, 3) + linear(EMB, 2 * num_out)
    flops += conv(num_in, num_out, 1) if num_in != num_out else 0
    if attention:
        flops += conv(num_out, 3 * num_out, 1) + 2 * 2 * PIXELS**2 * num_out + conv(num_out, num_out, 1)
    return flops


FIRST = conv(3, C, 3) + linear(C, EMB)  # the layers whose inputs want no gradient
ENCODER = FIRST + linear(EMB, EMB) + block(C, C)
DECODER = block(C, C, attention=True) + block(C, C) + 2 * block(2 * C, C) + conv(C, 3, 3)
F = ENCODER + DECODER
HEAD = conv(C, C, 4, 16) + conv(C, C, 4, 1) + linear(C, 1)  # 8x8 -> 4x4 -> 1x1 -> a logit


def test_a_pass_costs_what_a_count_by_hand_finds():
    found = pass_cost(FLAT, DATA)
    assert (found.forward, found.encoder, found.head) == (F, ENCODER, HEAD)


def test_a_step_without_gan_is_a_pass_a_network_and_twice_that_backward():
    found = step_cost(FLAT, DATA, train(critic_steps_per_generator=5, **NO_GAN)).parts
    assert found == {
        step_parts.GENERATOR: F,
        step_parts.REAL: F / 5,
        step_parts.FAKE: F / 5,
        step_parts.GENERATOR_BACKWARD: (2 * F - FIRST) / 5,
        step_parts.CRITIC: F,
        step_parts.CRITIC_BACKWARD: 2 * F - FIRST,
    }


def test_the_gan_adds_two_encoder_passes_to_the_critic_and_one_to_the_generators_turn():
    with_gan, without = (step_cost(FLAT, DATA, train(**keys)).parts for keys in ({}, NO_GAN))
    added = {part: with_gan[part] - without.get(part, 0) for part in with_gan if with_gan[part] != without.get(part)}
    assert added == {
        # The gradient at the images alone: a backward pass of one encoder, not of its weights.
        step_parts.GAN: pytest.approx(
            (2 * (ENCODER + HEAD) - linear(C, EMB) - linear(EMB, EMB) - linear(EMB, 2 * C)) / 5
        ),
        step_parts.CRITIC: 2 * (ENCODER + HEAD),
        step_parts.CRITIC_BACKWARD: 2 * (2 * (ENCODER + HEAD) - FIRST),
    }


def test_one_pass_for_fake_score_and_gan_saves_an_encoder_pass_with_its_backward():
    separate, shared = (step_cost(FLAT, DATA, train(share_critic_pass=share)).total for share in (False, True))
    assert separate - shared == pytest.approx(3 * ENCODER - FIRST)


def test_backward_simulation_costs_half_of_a_students_other_steps():
    one, four = (step_cost(FLAT, DATA, train(num_steps=num, **NO_GAN)).total for num in (1, 4))
    assert four - one == pytest.approx(1.5 * F)  # 0, 1, 2 or 3 passes before the one that is trained, all as often


SWITCHES: list[dict[str, object]] = [
    {},
    NO_GAN,
    {"share_critic_pass": True},
    {"share_levels": True, "matching_levels": (0, 999), "precision": "bf16"},
    {"turns": "disjoint"},
    {"gan_features": "teacher"},
    {"gan_taps": 2, "gan_loss": "hinge", "r1_weight": 1.0},
    {"matching_weight": 0},
    {"num_steps": 2, "backward_simulation": False, "regression_weight": 0.25},
]


@pytest.mark.parametrize("keys", SWITCHES, ids=lambda keys: "-".join(keys) or "paper")
def test_a_meta_run_counts_what_a_real_run_counts(keys: dict[str, object]):
    wanted = train(critic_steps_per_generator=2, **keys)
    run, period = real_run(DEEP, wanted), wanted.critic_steps_per_generator
    found: dict[str, float] = {}
    for index in range(period):
        counter = FlopCounter()
        with step_parts.observed(run, counter), counter:
            run.step(index)
        for part, flops in counter.parts.items():
            found[part] = found.get(part, 0.0) + flops / period / wanted.batch_size
    counted = {part: flops for part, flops in found.items() if flops}  # updates and averages are no products
    assert step_cost(DEEP, DATA, wanted).parts == pytest.approx(counted)


def test_one_of_several_ranks_counts_what_one_process_does(monkeypatch: pytest.MonkeyPatch):
    alone = step_cost(FLAT, DATA, train())
    _iterations.cache_clear()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert step_cost(FLAT, DATA, train()) == alone


def test_full_size_networks_cost_what_was_measured_of_the_published_one():
    found = pass_cost(IMAGENET.teacher, IMAGENET.data)
    assert found.forward == pytest.approx(0.2193e12, rel=5e-3)
    assert found.encoder == pytest.approx(0.0596e12, rel=5e-3)


def imagenet(run: str, **over: object) -> StepCost:
    keys = Plan(WORKFLOW, "imagenet64").run(run).train.model_copy(update=over)
    return step_cost(IMAGENET.teacher, IMAGENET.data, keys)


def test_the_papers_step_costs_no_more_than_the_released_recipe():
    """4.8 F + 6.4 E, the heads, and the gradient of attention, which has no weights to leave out: 1.437 TFLOP."""
    found = imagenet("dmd2")
    assert round(found.total / 1e12, 3) <= 1.437
    one = pass_cost(IMAGENET.teacher, IMAGENET.data)
    assert found.total == pytest.approx(4.8 * one.forward + 6.4 * one.encoder + 6.4 * one.head, rel=1e-3)


def test_a_shared_critic_pass_costs_at_most_1_26_tflop():
    assert imagenet("dmd2", share_critic_pass=True).total <= 1.26e12


def test_what_fused_attention_does_again_is_distinguished():
    """The scores of a block at 8x8, formed again in each backward pass: the generator's fifth and the critic's."""
    found = step_cost(FLAT, DATA, train(critic_steps_per_generator=5, **NO_GAN))
    assert found.recomputed == 2 * PIXELS**2 * C * (1 + 1 / 5)


def test_features_cost_what_their_networks_do():
    assert inception_cost() == pytest.approx(2 * 5.7e9, rel=0.02)  # 5.7 G multiply-adds (Szegedy et al. 2016)
    digits = Plan(WORKFLOW, "digits").preset
    by_hand = conv(1, 32, 3) + conv(32, 32, 3) + conv(32, 64, 3, 16) + conv(64, 64, 3, 16) + linear(4 * 64, 64)
    assert features_cost(digits.features, digits.data) == by_hand
