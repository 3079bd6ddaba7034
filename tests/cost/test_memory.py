"""Bytes are those of a real run: exact where they lie still, within a tenth where they come and go."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from counted import DATA, DEEP, FLAT, NO_GAN, real_run, saved_for_backward, train
from torch import Tensor

from dmd2.config import TeacherConfig, Train
from dmd2.cost import step_parts
from dmd2.cost.memory import LiveBytes, Memory, Turn, measure_memory
from dmd2.cost.meta_run import meta_run, meta_teacher, meta_tensors
from dmd2.cost.placement import check_share, place, sharded
from dmd2.errors import UserError
from dmd2.method.distillation import Distillation


def bytes_of(value: Any) -> int:
    """The bytes of the tensors in nested mappings and lists, counted by their elements."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    nested = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(bytes_of(item) for item in nested)


@cache
def measured(teacher: TeacherConfig, keys: str, sizes: tuple[int, ...], parts: int, recompute: bool) -> Memory:
    wanted = Train.model_validate_json(keys)
    return measure_memory(teacher, DATA, wanted, sizes=sizes, parts=parts, recompute=recompute, kernels="reference")


def on_meta(keys: Train, *sizes: int, teacher: TeacherConfig = FLAT, parts: int = 1, recompute: bool = False) -> Memory:
    return measured(teacher, keys.model_dump_json(), sizes or (1, 16), parts, recompute)


def test_weights_optimizers_and_average_are_exactly_a_real_runs():
    keys = train(ema_decay=0.9)
    run = real_run(FLAT, keys)
    run.step(0)
    saved, found = run.state_dict(), on_meta(keys).state
    assert found.generator == bytes_of(run.generator.state_dict())
    assert found.critic == bytes_of(run.critic.state_dict())
    assert found.teacher == bytes_of(run.teacher.denoiser.state_dict())
    assert found.optimizers == bytes_of(saved["generator_optimizer"]) + bytes_of(saved["critic_optimizer"])
    assert found.average == bytes_of(saved["average"])
    assert found.generator_gradients == sum(4 * p.numel() for p in run.generator.parameters())
    assert found.critic_gradients == sum(4 * p.numel() for p in run.critic.parameters())


@pytest.mark.parametrize("keys", [{}, NO_GAN, {"share_critic_pass": True, "precision": "bf16"}])
def test_autograd_keeps_the_same_bytes_for_meta_tensors_as_for_a_real_run(keys: dict[str, Any]):
    def kept(run: Distillation) -> int:
        with saved_for_backward() as sizes:
            run.step(0)
        return sum(sizes)

    with meta_tensors():
        found = kept(meta_run(meta_teacher(FLAT, DATA), train(**keys)))
    assert found == pytest.approx(kept(real_run(FLAT, train(**keys))), rel=0.1)


def allocated_by_step(run: Distillation) -> int:
    """The most that a step has beyond what was there before, as torch's profiler sees the allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run.step(0)
    now = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("keys", [{}, NO_GAN])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_peak_of_a_step_is_the_allocators_within_a_tenth(keys: dict[str, Any], recompute: bool):
    memory = on_meta(train(**keys), teacher=DEEP, recompute=recompute)
    run = real_run(DEEP, train(batch_size=16, **keys))
    for network in (run.generator, run.critic.fake):
        network.prepare(activation_checkpointing=recompute)
    run.step(5)  # makes what a first step makes once
    assert memory.peak(16) - memory.state.total == pytest.approx(allocated_by_step(run), rel=0.1)


def test_a_real_run_watched_in_the_same_way_has_the_same_peaks():
    live = LiveBytes()
    with live:
        run = real_run(FLAT, train(batch_size=16))
        with step_parts.observed(run, live):
            run.step(0)
    found = on_meta(train())
    for part in (*step_parts.GENERATOR_TURN, *step_parts.CRITIC_TURN):
        assert found.turns[part].at(16) + found.state.total == pytest.approx(live.peaks[part], rel=0.1), part


def test_recomputed_blocks_keep_less_and_more_samples_more():
    plain, recomputed = on_meta(train()), on_meta(train(), recompute=True)
    assert recomputed.critic_turn(16) < 0.7 * plain.critic_turn(16)
    assert recomputed.state == plain.state
    assert plain.peak(16) > plain.peak(8) > plain.peak(1)


def test_several_parts_hold_the_gradients_of_the_earlier_ones():
    one, two = on_meta(train()), on_meta(train(), parts=2)
    gradients = {step_parts.GENERATOR: one.state.generator_gradients, step_parts.CRITIC: one.state.critic_gradients}
    images = 16 * 3 * 8 * 8 * 4
    for part, held in gradients.items():
        more = two.turns[part].at(16) - one.turns[part].at(16)
        assert held <= more <= held + 4 * images  # the other part's own images, twice, and the larger batch of data


def test_a_size_between_measured_ones_is_not_underestimated():
    between = on_meta(train(), 1, 3, 9).peak(5)
    measured = on_meta(train(), 1, 5).peak(5)
    assert measured <= between * (1 + 1e-9)
    assert between == pytest.approx(measured, rel=0.1)


def test_chords_go_on_beyond_the_last_size():
    turn = Turn(((1, 10.0), (3, 14.0), (5, 24.0)))
    assert [turn.at(n) for n in (1, 2, 3, 4, 5, 7)] == [10, 12, 14, 19, 24, 34]


def test_sharded_ranks_hold_their_part_of_state_and_gradients():
    whole = on_meta(train(ema_decay=0.9))
    half = sharded(whole, 2)
    assert half.state.total == pytest.approx(whole.state.total / 2, rel=1e-3)
    gathered = 3 * whole.state.largest_unit
    part = step_parts.GENERATOR_BACKWARD
    saved = whole.turns[part].at(1) - half.turns[part].at(1)
    assert saved == pytest.approx(whole.state.generator_gradients / 2 - gathered)


def test_a_share_is_cut_as_the_training_cuts_it_and_the_largest_part_that_fits_is_reported():
    memory = on_meta(train())
    room = memory.peak(4) + 1
    found = place(lambda parts, samples: memory, room, "replicate", 2, batch=48, micro=5)  # 6 of 24 are too many
    assert (found.share, found.largest, found.micro_batch, found.parts, found.fits) == (24, 4, 4, 6, True)
    whole = place(lambda parts, samples: memory, room, "replicate", 2, batch=48, micro=None)
    assert (whole.micro_batch, whole.largest, whole.fits) == (24, 4, False)
    assert not place(lambda parts, samples: memory, room, "replicate", 2, batch=48, micro=6).fits
    assert not place(lambda parts, samples: memory, memory.state.total, "replicate", 2, batch=48, micro=None).fits


def test_a_batch_that_cannot_be_divided_is_an_error():
    with pytest.raises(UserError, match="run dmd2: batch_size 280 is not divisible by 16 GPUs; use 272 or 288"):
        check_share("dmd2", 280, 16)
    with pytest.raises(UserError, match="batch_size 8 is not divisible by 16 GPUs; use 16"):
        check_share("dmd2", 8, 16)
    check_share("dmd2", 280, 8)
    memory = on_meta(train())
    assert place(lambda parts, samples: memory, 1e12, "replicate", 8, batch=280, micro=40).micro_batch == 35
