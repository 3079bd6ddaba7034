"""f-divergence weighting of the matching loss by the discriminator's logits."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from toy import SHAPE, labels, rng, toy_teacher

from dmd2.config import Train
from dmd2.method import losses
from dmd2.method.critic import Critic
from dmd2.method.divergence import BINS, sample_weights
from dmd2.method.noise import NoiseGrid


@pytest.mark.parametrize(("divergence", "h"), [("js", lambda r: r / (1 + r)), ("kl", lambda r: r)])
def test_weights_are_h_of_the_ratio_relative_to_its_mean_in_the_noise_bin(divergence: str, h):
    grid = NoiseGrid.karras()
    index = torch.tensor([0, 99, 100, 550, 551, 999])
    logits = torch.tensor([[0.0, 1.0], [2.0, -1.0], [30.0, 30.0], [-2.0, 0.0], [1.0, 1.0], [-50.0, 0.0]])
    found = sample_weights(logits, grid.sigmas[index], grid, divergence)
    ratio = np.exp(np.clip(logits.numpy().mean(1), -10, 10))
    bins = index.numpy() * BINS // 1000
    relative = ratio / np.array([ratio[bins == own].mean() for own in bins])
    expected = h(relative) / h(relative).mean()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    assert float(found.mean()) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("keys", [{}, {"gan_features": "teacher"}, {"share_levels": True, "gan_levels": (20, 980)}])
def test_the_switch_multiplies_each_samples_gradient_and_the_logits_are_of_the_same_noised_samples(keys):
    teacher, num = toy_teacher(), 7
    critic = Critic(toy_teacher(1).copy_network(), num_taps=1)
    torch.manual_seed(0)
    for parameter in critic.heads.parameters():
        torch.nn.init.normal_(parameter)
    x0, seen = torch.randn(num, *SHAPE, generator=rng(1)), []
    critic.register_forward_hook(lambda _, inputs, output: seen.append((inputs[1], output[1])))
    found = {}
    for divergence in (None, "js"):
        train = Train(f_divergence=divergence, **keys)
        seen.clear()
        found[divergence] = losses.generator_terms(x0, labels(num), teacher, critic, train, rng(2))[0]
    sigma, logits = next((sigma, logits) for sigma, logits in seen if logits is not None)
    weight = sample_weights(logits, sigma, teacher.grid, "js")
    assert float(weight.std()) > 0.01
    expected = found[None][1] * weight.view(-1, 1, 1, 1)
    torch.testing.assert_close(found["js"][1], expected, rtol=1e-5, atol=1e-9)


def test_a_divergence_needs_matching_and_gan():
    with pytest.raises(ValidationError, match="f_divergence weights the matching loss by the GAN's logits"):
        Train(f_divergence="js", gan_generator_weight=0, gan_critic_weight=0)
