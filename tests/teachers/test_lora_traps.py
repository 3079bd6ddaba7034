"""What peft does silently when a network changes its role, each with its cure taken out, which must be noticed."""

from typing import Any

import pytest
import torch
from shared_roles import LORA, base, batch, made, shaken
from torch import Tensor

from dmd2 import config
from dmd2.teachers.lora import Role, SharedNetwork, roles


@pytest.mark.parametrize("recompute", [False, True])
def test_each_backward_reaches_exactly_its_own_weights(recompute: bool) -> None:
    """Traps 1 and 3: between a role's forward and backward the others run, as in a training step."""
    assert _wrong_gradients(made(), recompute) == []


def _wrong_gradients(found: dict[str, Role], recompute: bool) -> list[str]:
    """Adapters whose gradients are not those of an undisturbed pass in their role."""
    x, sigma, cond = batch()
    expected: dict[str, Tensor | None] = {}
    for name in ("student", "critic"):
        with found[name].shared.role(name) as network:
            network(x, sigma, cond).square().sum().backward()  # forward and backward in one role
        for key, parameter in found[name].named_parameters():
            expected[f"{name}.{key}"], parameter.grad = parameter.grad, None
    found["student"].prepare(activation_checkpointing=recompute)
    student = found["student"](x, sigma, cond)
    with torch.no_grad():
        found["teacher"](x, sigma, cond)
    critic = found["critic"](x, sigma, cond)
    student.square().sum().backward()
    found["teacher"](x, sigma, cond)
    untouched = all(parameter.grad is None for parameter in found["critic"].parameters())
    critic.square().sum().backward()
    found["student"].prepare(activation_checkpointing=False)
    wrong = [] if untouched else ["the student's backward reached the critic"]
    for name in ("student", "critic"):
        for key, parameter in found[name].named_parameters():
            want, have = expected[f"{name}.{key}"], parameter.grad
            if want is None or have is None or not torch.allclose(have, want, rtol=1e-4, atol=1e-6):
                wrong.append(f"{name}.{key}")
    return wrong


def _switch_by_peft(self: SharedNetwork, layers: Any, name: str) -> None:
    for layer in layers:
        layer.enable_adapters(name != "teacher")
        if name != "teacher":
            layer.set_adapter(name)


def _switch_without_enabling(self: SharedNetwork, layers: Any, name: str) -> None:
    for layer in layers:
        layer.enable_adapters(False) if name == "teacher" else layer.set_adapter(name)


def test_trap_1_flags_that_stay_changed_lose_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    found = made()
    monkeypatch.setattr(SharedNetwork, "_switch", _switch_by_peft)
    x, sigma, cond = batch()
    out = found["student"](x, sigma, cond)
    found["teacher"](x, sigma, cond)
    assert not any(parameter.requires_grad for parameter in found["student"].parameters())
    out.square().sum().backward()
    assert all(parameter.grad is None for parameter in found["student"].parameters())


def test_trap_2_adapters_that_stay_off_make_the_critic_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    found = made()
    monkeypatch.setattr(SharedNetwork, "_switch", _switch_without_enabling)
    x, sigma, cond = batch()
    assert torch.equal(found["critic"](x, sigma, cond), found["teacher"](x, sigma, cond))


@pytest.mark.parametrize("cured", [True, False])
def test_trap_3_blocks_recompute_in_the_role_that_ran_them(cured: bool) -> None:
    """Without the cure a backward in the critic's role computes the student's gradient with the critic's adapters.

    torch notices it only where the two have different ranks.
    """
    found = roles(base(), dict.fromkeys(LORA, config.LoRA(rank=2)))
    shaken(found["student"], 1)
    shaken(found["critic"], 2)
    x, sigma, cond = batch()
    found["student"](x, sigma, cond).square().sum().backward()
    expected = [parameter.grad for parameter in found["student"].parameters()]
    found["student"].zero_grad()
    found["student"].prepare(activation_checkpointing=True)
    for block in found["student"].shared.network.blocks() if not cured else []:
        del block.__dict__["at_recompute"]
    out = found["student"](x, sigma, cond).square().sum()
    with found["student"].shared.role("critic"):
        out.backward()
    gradients = [parameter.grad for parameter in found["student"].parameters()]
    same = [a is not None and b is not None and torch.allclose(a, b) for a, b in zip(gradients, expected, strict=True)]
    assert all(same) == cured
    assert all(parameter.grad is None for parameter in found["critic"].parameters())
