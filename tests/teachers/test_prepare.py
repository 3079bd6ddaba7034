"""Compiled and recomputed blocks: the same network, run in another way."""

import copy
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from edm_by_hand import distance, randomised
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from dmd2 import config
from dmd2.method.denoiser import Denoiser
from dmd2.teachers import load_teacher

DATA = config.Data(source="digits", resolution=8, channels=1, num_classes=10, levels=17)
SIZE = {"model_channels": 8, "num_blocks": 1, "attn_resolutions": (4,), "channels_per_head": 8}
ARCHS = ["adm", "ddpmpp"]


def network(arch: str, levels: tuple[int, ...] = (1,), **more: Any) -> Denoiser:
    sizes = config.Network(arch=arch, channel_mult=levels, **SIZE, **more)
    return randomised(load_teacher(config.TeacherConfig(kind="edm", network=sizes), DATA).copy_network().eval())


def batch(num: int = 3) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(1)
    label = torch.arange(num) % 10
    return torch.randn(num, 1, 8, 8, generator=rng), torch.rand(num, generator=rng) + 0.1, {"label": label}


def passed(denoiser: Denoiser, num: int = 3) -> dict[str, Tensor]:
    """x0, features and all gradients of a pass that decodes two samples and taps all."""
    x, sigma, cond = batch(num)
    x.requires_grad_()
    denoiser.zero_grad()
    x0, (features,) = denoiser.denoise_and_tap(x, sigma, cond, 2)
    (x0.square().sum() + features.square().sum()).backward()
    grads = {name: p.grad for name, p in denoiser.named_parameters()}
    return {"x0": x0.detach(), "features": features.detach(), "x": x.grad, **grads}


def stored(run: Callable[[], object]) -> int:
    """Bytes that autograd keeps between forward and backward, weights aside."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


@pytest.mark.parametrize("arch", ARCHS)
def test_recomputed_blocks_give_the_same_bits_and_store_less(arch: str):
    plain, recomputed = network(arch, (1, 2)), network(arch, (1, 2))
    recomputed.prepare(activation_checkpointing=True)
    found, truth = passed(recomputed), passed(plain)
    assert all(torch.equal(found[name], truth[name]) for name in truth)
    x, sigma, cond = batch(3)
    outputs = []  # held, so that no storage is freed and counted as another's
    sizes = [stored(lambda net=net: outputs.append(net(x, sigma, cond))) for net in (plain, recomputed)]
    assert sizes[1] < 0.4 * sizes[0]


def test_recomputed_blocks_repeat_their_dropout():
    denoiser = network("adm", (1, 2), dropout=0.5).train()
    torch.manual_seed(3)
    truth = passed(denoiser)
    denoiser.prepare(activation_checkpointing=True)
    torch.manual_seed(3)
    found = passed(denoiser)
    assert all(torch.equal(found[name], truth[name]) for name in truth)
    assert not torch.equal(passed(denoiser)["x0"], truth["x0"])


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_compiled_blocks_equal_eager_ones_up_to_rounding(arch: str, activation_checkpointing: bool):
    plain, compiled = network(arch), network(arch)
    compiled.prepare(compile=True, activation_checkpointing=activation_checkpointing, backend="aot_eager")
    found, truth = passed(compiled), passed(plain)
    assert {name for name in truth if distance(found[name], truth[name]) > 1e-5} == set()


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor's code for CPUs needs a C++ compiler")
def test_inductor_compiles_a_block(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # no processes that import torch each
    monkeypatch.setattr("torch._inductor.config.cpp_cache_precompile_headers", False)  # for one kernel of each kind
    plain, compiled = network("adm"), network("adm")
    monkeypatch.setattr(compiled, "blocks", lambda: [compiled.model.dec["8x8_in1"]])
    compiled.prepare(compile=True)
    found, truth = passed(compiled), passed(plain)
    assert {name for name in truth if distance(found[name], truth[name]) > 1e-5} == set()


def test_every_block_is_compiled_and_none_falls_back(monkeypatch: pytest.MonkeyPatch):
    denoiser = network("adm")
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    denoiser.prepare(compile=True, backend=backend)
    with torch.no_grad():
        denoiser(*batch())
    assert len(graphs) == len(denoiser.blocks()) == 5
    denoiser(*batch())
    assert len(graphs) == 10, "gradients are a form of their own"
    denoiser(*batch())
    assert len(graphs) == 10, "a form is compiled once"

    denoiser = network("adm")
    monkeypatch.setattr(denoiser, "blocks", lambda: [denoiser.model.enc["8x8_block0"]])
    graphs.clear()
    denoiser.prepare(compile=True, backend=backend)
    for num in range(1, 13):
        denoiser(*batch(num))
    assert len(graphs) == 12, "torch's own limit is 8 forms, after which a block is slow without a word"


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_blocks_whose_weights_are_sharded_compile_too(one_process: DeviceMesh, activation_checkpointing: bool):
    plain, sharded = network("adm"), network("adm")
    for block in sharded.blocks():
        fully_shard(block, mesh=one_process)
    fully_shard(sharded, mesh=one_process)
    register_fsdp_forward_method(sharded, "denoise_and_tap")
    sharded.prepare(compile=True, activation_checkpointing=activation_checkpointing, backend="aot_eager")
    found, truth = passed(sharded), passed(plain)
    whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in found.items()}
    assert {name for name in truth if distance(whole[name], truth[name]) > 1e-5} == set()
    assert list(sharded.state_dict()) == list(plain.state_dict())


def test_state_dict_is_untouched_and_a_copy_is_an_eager_network():
    plain, denoiser = network("adm"), network("adm")
    denoiser.prepare(compile=True, activation_checkpointing=True, backend="aot_eager")
    assert list(denoiser.state_dict()) == list(plain.state_dict())
    copied = copy.deepcopy(denoiser)
    with torch.no_grad():
        for p in denoiser.parameters():
            p.zero_()
    assert torch.equal(copied(*batch()), plain(*batch()))
