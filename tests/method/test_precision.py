"""Training in bfloat16: what computes in it, what does not, and how far the gradients move."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import rng

from dmd2 import config
from dmd2.config import Train
from dmd2.method.distillation import Distillation
from dmd2.teachers import load_teacher
from dmd2.training.optimizer import Optimizer

BATCH, CLASSES = 8, 3
DATA = config.Data(source="digits", resolution=8, channels=1, num_classes=CLASSES)
TEACHER = config.TeacherConfig(
    kind="edm",
    network=config.Network(
        model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=16
    ),
)


def data(index: int) -> tuple[Tensor, dict[str, Tensor]]:
    x0 = torch.rand(BATCH, 1, 8, 8, generator=rng(index)) * 2 - 1
    return x0, {"label": torch.randint(CLASSES, (BATCH,), generator=rng(index))}


def distillation(**keys: Any) -> Distillation:
    teacher = load_teacher(TEACHER, DATA)
    with torch.no_grad():  # away from its first weights, whose output layers are zero
        for p in teacher.denoiser.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=rng(p.numel())))
    run = Distillation(teacher, Train(batch_size=BATCH, num_snapshots=1, warmup_iterations=0, **keys), data=data)
    with torch.no_grad():
        for p in run.critic.fake.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=rng(p.numel() + 1)))
    return run


def networks(run: Distillation) -> dict[str, nn.Module]:
    return {"generator": run.generator, "real": run.teacher.denoiser, "fake": run.critic.fake}


@pytest.mark.parametrize(("keys", "inside"), [({}, torch.float32), ({"precision": "bf16"}, torch.bfloat16)])
def test_networks_compute_in_the_precision_and_all_around_them_stays_float32(keys: dict[str, Any], inside: torch.dtype):
    run = distillation(**keys)
    convolved: dict[str, set[torch.dtype]] = {}
    around: set[torch.dtype] = set()
    for name, network in networks(run).items():
        blocks = [module for module in network.modules() if type(module).__name__ == "Conv"]
        assert len(blocks) > 5
        for module in blocks:
            seen = convolved.setdefault(name, set())
            module.register_forward_hook(lambda _, __, output, seen=seen: seen.add(output.dtype))
        network.register_forward_hook(lambda _, __, output: around.add(output.dtype))
    run.critic.register_forward_hook(
        lambda _, __, output: around.update(
            (output[0].out.dtype, *(logits.dtype for logits in output[1:] if logits is not None))
        )
    )
    for head in run.critic.heads:
        head.register_forward_pre_hook(lambda _, inputs: around.add(inputs[0].dtype))
    metrics = run.step(0)
    assert convolved == {name: {inside} for name in networks(run)}
    assert around == {torch.float32}
    assert {value.dtype for value in metrics.values()} == {torch.float32}
    assert {p.dtype for network in (run.generator, run.critic) for p in network.parameters()} == {torch.float32}
    assert {value.dtype for value in run.export().values() if value.is_floating_point()} == {torch.float32}


def gradients(monkeypatch: pytest.MonkeyPatch, **keys: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    found: dict[str, Tensor] = {}
    step = Optimizer.step

    def spy(self: Optimizer, index: int, guard: Any, terms: Any, name: str) -> Tensor:
        found[name] = torch.cat([p.grad.flatten() for p in self.params])
        assert found[name].dtype == torch.float32
        return step(self, index, guard, terms, name)

    with monkeypatch.context() as patch:
        patch.setattr(Optimizer, "step", spy)
        return found, distillation(**keys).step(0)


def test_gradients_in_bfloat16_point_where_those_in_float32_do(monkeypatch: pytest.MonkeyPatch):
    narrow, narrow_metrics = gradients(monkeypatch, precision="bf16")
    wide, wide_metrics = gradients(monkeypatch)
    for name in ("generator_grad_norm", "critic_grad_norm"):
        away = float((narrow[name] - wide[name]).norm() / wide[name].norm())
        # bfloat16 rounds to 1 part in 256; through the layers and the difference of two scores it is a few times that.
        assert 1e-4 < away < 0.05, name
    for name in ("matching_loss", "denoising_loss", "gan_generator_loss", "gan_critic_loss"):
        assert float(narrow_metrics[name]) == pytest.approx(float(wide_metrics[name]), rel=0.02), name


def test_a_run_in_float32_is_the_default_bit_for_bit():
    default, named = distillation(), distillation(precision="fp32")
    for index in range(2):
        one, other = default.step(index), named.step(index)
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(map(torch.equal, default.networks().values(), named.networks().values()))
    assert all(network.precision == "fp32" for network in networks(default).values())
