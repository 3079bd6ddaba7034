"""Three roles of one frozen network: each has its own output, its own gradients and its own weights."""

import copy
from collections.abc import Callable

import pytest
import torch
from peft.tuners.lora import LoraLayer
from shared_roles import LORA, alone, base, batch, made
from tiny_pipelines import KINDS, tiny_data, tiny_teacher
from torch import Tensor

from dmd2 import config
from dmd2.errors import UserError
from dmd2.method.critic import Critic
from dmd2.teachers import load_teacher
from dmd2.teachers.diffusers_unet import DiffusersDenoiser
from dmd2.teachers.lora import load_adapter, roles


@pytest.mark.parametrize("kind", KINDS)
def test_three_roles_give_three_outputs(kind: str) -> None:
    found, plain = made(kind), base(kind)
    x, sigma, cond = batch(kind)
    outputs = {name: role(x, sigma, cond) for name, role in found.items()}
    again = {name: found[name](x, sigma, cond) for name in ("critic", "teacher", "critic", "student")}
    for name, value in again.items():  # also after the teacher, which has its adapters off: trap 2
        assert torch.equal(value, outputs[name]), name
    assert torch.equal(outputs["teacher"], plain(x, sigma, cond))
    for first, second in (("teacher", "student"), ("teacher", "critic"), ("student", "critic")):
        assert (outputs[first] - outputs[second]).abs().max() > 1e-3, (first, second)


def test_roles_start_equal_to_the_teacher_and_depend_on_the_seed_alone() -> None:
    state, found = torch.random.get_rng_state(), roles(base(), LORA, seed=1)
    x, sigma, cond = batch()
    for role in found.values():
        assert torch.equal(role(x, sigma, cond), found["teacher"](x, sigma, cond))
    assert torch.equal(state, torch.random.get_rng_state())
    same, other = (roles(base(), LORA, seed=seed)["student"].state_dict() for seed in (1, 2))
    first = found["student"].state_dict()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_roles_weights_are_its_adapters_alone() -> None:
    found = made()
    assert not list(found["teacher"].parameters())
    student = dict(found["student"].named_parameters())
    assert list(student) == list(found["student"].state_dict())
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight" in student
    assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in student)
    mine, other = ({id(p) for p in found[name].parameters()} for name in ("student", "critic"))
    assert not mine & other
    frozen = [p for n, p in found["teacher"].shared.network.named_parameters() if ".lora_" not in n]
    assert frozen
    assert not any(parameter.requires_grad for parameter in frozen)


def test_frozen_adapters_stay_frozen_through_switches() -> None:
    found = made()
    found["critic"].requires_grad_(False)
    found["student"](*batch())
    assert not any(parameter.requires_grad for parameter in found["critic"].parameters())
    assert all(parameter.requires_grad for parameter in found["student"].parameters())


def test_a_role_that_fails_is_left() -> None:
    found = made()
    x, sigma, cond = batch()
    expected = found["teacher"](x, sigma, cond)
    with pytest.raises(KeyError):
        found["student"](x, sigma, {})
    with found["teacher"].shared.role("teacher") as network:
        assert torch.equal(network(x, sigma, cond), expected)
    assert torch.equal(found["teacher"].shared.network(x, sigma, cond), expected)


def test_gradients_are_those_of_merged_weights_with_respect_to_the_input() -> None:
    found = made()
    x, sigma, cond = batch()
    for name in ("student", "critic"):
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        for network, leaf in zip((found[name], alone(found[name])), inputs, strict=True):
            network(leaf, sigma, cond).square().sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-3, atol=1e-3)


def test_the_scale_is_alpha_over_rank() -> None:
    student = made()["student"]
    layer = next(module for module in student.shared.network.modules() if isinstance(module, LoraLayer))
    assert layer.scaling == {"student": 0.5, "critic": 2.0}
    x, sigma, cond = batch()
    torch.testing.assert_close(student(x, sigma, cond), alone(student)(x, sigma, cond), rtol=1e-3, atol=1e-3)


def test_a_critic_with_heads_trains_its_adapters_and_heads() -> None:
    critic = Critic(made()["critic"], num_taps=1)
    x, sigma, cond = batch()
    prediction, logits = critic(x, sigma, cond, num_denoise=1, logits_from=1)
    assert logits is not None
    (prediction.x0(x[:1]).sum() + logits.sum()).backward()
    assert all(parameter.grad is not None for parameter in critic.parameters())
    names = {name.split(".")[0] for name in critic.state_dict()}
    assert names == {"fake", "heads"}


def test_the_frozen_weights_may_be_stored_in_bf16_and_computed_in_either() -> None:
    found = made()
    network = found["teacher"].store("bf16").shared.network
    kinds = {".lora_" in name: parameter.dtype for name, parameter in network.named_parameters()}
    assert kinds == {False: torch.bfloat16, True: torch.float32}
    x, sigma, cond = batch()
    exact = found["student"](x, sigma, cond)
    found["student"].precision = "bf16"
    dtypes: list[torch.dtype] = []
    network.mid_block.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    rounded = found["student"](x, sigma, cond)
    assert dtypes == [torch.bfloat16]
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.1
    rounded.sum().backward()
    assert {p.grad.dtype for p in found["student"].parameters() if p.grad is not None} == {torch.float32}
    found["teacher"](x, sigma, cond)
    assert dtypes[-1] == torch.float32  # each role keeps its own precision


def test_a_copy_of_the_teacher_is_a_plain_network() -> None:
    found, plain = made(), base()
    teacher = load_teacher(tiny_teacher("sd15"), tiny_data())
    network = copy.deepcopy(found["teacher"])
    assert isinstance(network, DiffusersDenoiser)
    assert list(network.state_dict()) == list(plain.state_dict())
    x, sigma, cond = batch()
    assert torch.equal(network(x, sigma, cond), plain(x, sigma, cond))
    network.prepare(activation_checkpointing=True)
    network.requires_grad_(True)(x, sigma, cond).sum().backward()
    assert all(parameter.grad is None for parameter in found["teacher"].shared.network.parameters())
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(found["student"])
    assert teacher.copy_network() is not teacher.denoiser


def test_adapters_are_restored_from_their_state() -> None:
    source, target = made()["student"], roles(base(), LORA)["student"]
    load_adapter(target, source.state_dict(), "w.safetensors")
    assert torch.equal(target(*batch()), source(*batch()))


REFUSED: list[tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = [
    (
        "rank",
        lambda state: {k: v[:1] if "lora_A" in k else v[:, :1] for k, v in state.items()},
        "of rank 1, but rank 2",
    ),
    ("missing", lambda state: dict(list(state.items())[2:]), "2 missing"),
    (
        "base",
        lambda state: {k: v.repeat(1, 2, *[1] * (v.ndim - 2)) if "lora_A" in k else v for k, v in state.items()},
        "mismatching",
    ),
    ("unexpected", lambda state: state | {"conv_in.lora_A.weight": torch.zeros(2, 4, 3, 3)}, "1 unexpected: conv_in"),
]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_unsuitable_adapters_are_refused(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    role = made()["student"]
    before = {name: value.clone() for name, value in role.state_dict().items()}
    with pytest.raises(UserError, match=rf"w.safetensors: .*{message}"):
        load_adapter(role, change(dict(role.state_dict())), "w.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in role.state_dict().items())


def test_targets_that_name_no_module_are_refused() -> None:
    with pytest.raises(UserError, match=r"train\.student_lora\.targets"):
        roles(base(), {"student": config.LoRA(rank=2, targets=("to_query",))})
