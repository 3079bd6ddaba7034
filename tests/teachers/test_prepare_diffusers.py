"""Blocks of diffusers' U-Nets, compiled and sharded: the same network, run in another way."""

from typing import Any

import pytest
import torch
from shared_roles import base, batch, made
from tiny_pipelines import KINDS
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from dmd2.method.denoiser import Denoiser
from dmd2.teachers.diffusers_layers import RecomputedResnet, RecomputedTransformer


def passed(denoiser: Denoiser, kind: str) -> dict[str, Tensor]:
    """The output, a feature and all gradients of a pass that decodes one sample of two."""
    x, sigma, cond = batch(kind)
    x0, (features,) = denoiser.denoise_and_tap(x, sigma, cond, 1)
    (x0.square().sum() + features.square().sum()).backward()
    grads = {name: p.grad for name, p in denoiser.named_parameters() if p.grad is not None}
    return {"x0": x0.detach(), "features": features.detach(), **grads}


def distant(found: dict[str, Any], truth: dict[str, Tensor]) -> set[str]:
    """The values that differ by more than rounding."""
    assert found.keys() == truth.keys()
    whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in found.items()}
    return {name for name, true in truth.items() if (whole[name] - true).norm() > 1e-4 * true.norm() + 1e-6}


def some_blocks(denoiser: Any) -> list[torch.nn.Module]:
    """One residual and one transformer block: each kind compiles the same way."""
    kinds = (RecomputedResnet, RecomputedTransformer)
    return [next(block for block in denoiser.blocks() if isinstance(block, kind)) for kind in kinds]


@pytest.mark.parametrize("activation_checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_blocks_equal_eager_ones_up_to_rounding(
    kind: str, activation_checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, compiled = base(kind), base(kind)
    chosen = some_blocks(compiled)
    monkeypatch.setattr(compiled, "blocks", lambda: chosen)
    compiled.prepare(compile=True, activation_checkpointing=activation_checkpointing, backend="aot_eager")
    assert distant(passed(compiled, kind), passed(plain, kind)) == set()


def test_compiled_blocks_keep_the_roles_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, compiled = made(), made()
    network = compiled["teacher"].shared.network
    chosen = some_blocks(network)
    monkeypatch.setattr(network, "blocks", lambda: chosen)
    compiled["student"].prepare(compile=True, activation_checkpointing=True, backend="aot_eager")
    for name in ("student", "critic", "student"):
        for found in (plain, compiled):
            found[name].zero_grad()
        assert distant(passed(compiled[name], "sd15"), passed(plain[name], "sd15")) == set()
    x, sigma, cond = batch()
    torch.testing.assert_close(compiled["teacher"](x, sigma, cond), plain["teacher"](x, sigma, cond))


@pytest.mark.parametrize("activation_checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_sharded_blocks_give_the_same_gradients(
    kind: str, activation_checkpointing: bool, one_process: DeviceMesh
) -> None:
    plain, sharded = base(kind), base(kind)
    for block in sharded.blocks():
        fully_shard(block, mesh=one_process)
    fully_shard(sharded, mesh=one_process)
    register_fsdp_forward_method(sharded, "denoise_and_tap")
    sharded.prepare(activation_checkpointing=activation_checkpointing)
    assert list(sharded.state_dict()) == list(plain.state_dict())
    assert distant(passed(sharded, kind), passed(plain, kind)) == set()
