"""The digits preset trains equally with its losses in Triton and in plain torch.

Its norms stay in plain torch: a step of the U-Net takes minutes in the interpreter. `test_triton_training.py` has them.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import dmd2_kernels as dk
from dmd2.lineage.plan import Plan
from dmd2.method.distillation import Distillation
from dmd2.teachers import load_teacher

WORKFLOW = Path(__file__).parents[2] / "workflow"
CHANGES = {"batch_size": 4, "critic_steps_per_generator": 2}  # the interpreter takes seconds for each step
NUM_STEPS = 3  # two generator updates, the first and the last


def log_of(mode: str, device: str) -> list[dict[str, Tensor]]:
    """What the steps of run `dmd2` log with the losses in `mode`."""
    plan = Plan(WORKFLOW, "digits")
    train = plan.run("dmd2").train.model_copy(update=CHANGES)
    teacher = load_teacher(plan.preset.teacher, plan.preset.data)
    data = torch.rand((4, *teacher.sample_shape), generator=torch.Generator().manual_seed(0)) * 2 - 1
    cond = {"label": torch.arange(4)}
    run = Distillation(teacher, train, data=lambda _: (data, cond), device=device)
    with dk.use(mode):
        assert dk.implementation(data.to(device)).startswith(mode)
        return [run.step(index) for index in range(NUM_STEPS)]


def test_the_embedded_default_logs_the_same_losses(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = dk.GroupNormSiLU.forward

    def in_plain_torch(self: dk.GroupNormSiLU, *arguments: Tensor, **keys: Tensor) -> Tensor:
        with dk.use("reference"):
            return forward(self, *arguments, **keys)

    monkeypatch.setattr(dk.GroupNormSiLU, "forward", in_plain_torch)
    reference, kernels = log_of("reference", device), log_of("triton", device)
    assert kernels[-1]["matching_loss"] > 0, "the second update has something to match"
    for step, (expected, found) in enumerate(zip(reference, kernels, strict=True)):
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=f"{name} at step {step}")
