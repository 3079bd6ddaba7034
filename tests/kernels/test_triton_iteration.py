"""The losses of a training iteration through the trainer's own code: launches, layouts and the reference's results."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from toy import SIZES, labels, rng, shaken
from triton_mode import HAS_GPU

import dmd2_kernels as dk
from dmd2 import config
from dmd2.method import losses
from dmd2.method.critic import Critic
from dmd2.teachers import load_teacher
from dmd2_kernels import _chunks, _layer
from dmd2_kernels.ops import _launch

DATA = config.Data(source="digits", resolution=8, channels=3, num_classes=3, levels=17)
CONFIG = config.TeacherConfig(kind="edm", network=config.Network(**SIZES))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels in the order of their launches, with the norms in plain torch."""
    names: list[str] = []
    run: Callable[..., None] = _launch.launcher

    def record(kernel: Any, *rest: Any) -> None:
        names.append(kernel.__name__.lstrip("_"))
        run(kernel, *rest)

    monkeypatch.setattr(_launch, "launcher", record)
    monkeypatch.setattr(_layer, "implementation", lambda _: "reference")  # interpreted, the norms take most of the time
    return names


def iteration(mode: str, train: config.Train) -> list[torch.Tensor]:
    """Losses and gradients of the generator's and the critic's turn of EDM's network."""
    torch.manual_seed(0)
    with dk.use(mode):
        teacher = load_teacher(CONFIG, DATA)
        shaken(teacher.denoiser, 0.1, 1)
        critic = Critic(shaken(teacher.copy_network(), 0.1, 2), num_taps=1)
        x0 = torch.randn(3, 3, 8, 8, generator=rng(4))
        assert teacher.denoiser.predicts_x0 == (mode == "reference")
        matching, gan = losses.generator_terms(x0, labels(3), teacher, critic, train, rng(5))
        assert matching is not None
        assert gan is not None
        both = losses.critic_losses(x0, labels(3), lambda: (x0, labels(3)), teacher, critic, train, rng(6))
        assert both.gan is not None
        both.backward()
        weight = critic.fake.model.out_conv.weight
        assert weight.grad is not None
        found = [matching[0].loss, matching[1], gan[0].loss, gan[1], both.denoising.loss, both.gan.loss]
        return [t.detach() for t in (*found, both.gan.accuracy, weight.grad)]


@pytest.mark.skipif(HAS_GPU, reason="the networks are on the CPU")
@pytest.mark.parametrize("keys", [{}, {"share_levels": True, "gan_levels": (20, 980), "f_divergence": "js"}])
def test_an_iteration_launches_each_loss_once_and_gives_what_the_reference_gives(
    keys: dict[str, Any], launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = config.Train(**keys)
    expected = iteration("reference", train)
    assert launched == []
    for largest, matching in ((16_384, ["whole_sample"]), (64, ["distances", "chunk_gradients"])):
        monkeypatch.setattr(_chunks, "WHOLE_SAMPLE", largest)
        for mine, true in zip(iteration("triton", train), expected, strict=True):
            torch.testing.assert_close(mine, true, rtol=2e-3, atol=1e-4 * float(true.abs().max()))
        assert sorted(launched) == sorted([*matching, "generator", "loss_and_grad", "critic"])
        launched.clear()
