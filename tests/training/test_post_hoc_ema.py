"""Averages of any width, from power-function averages stored during training (EDM2, section 3 and appendix C)."""

import numpy as np
import pytest
import torch
from torch import nn

from dmd2.training.optimizer import EMA
from dmd2.training.post_hoc_ema import WIDEST, combination, combined, exponent, power_decay


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.10, 6.94), (WIDEST, 0.0)])
def test_exponents_of_widths_are_the_published_ones(width: float, gamma: float):
    """Table 5 of the paper: 16.97 for 5 %, 6.94 for 10 %."""
    assert exponent(width) == pytest.approx(gamma, abs=6e-3)
    tau = (np.arange(200_000) + 0.5) / 200_000
    density = (exponent(width) + 1) * tau ** exponent(width) / len(tau)
    mean = (density * tau).sum()
    assert np.sqrt((density * (tau - mean) ** 2).sum()) == pytest.approx(width, rel=1e-3)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.3])
def test_widths_that_no_average_has_are_refused(width: float):
    with pytest.raises(ValueError, match=r"an average's width is in \(0, 0.2887\]"):
        exponent(width)


def averages_of(path: np.ndarray, widths: list[float], stored_at: list[int]) -> dict[tuple[int, float], float]:
    """The averages of a network of one parameter that takes the values `path`, as `EMA` makes them."""
    network = nn.Linear(1, 1, bias=False)
    averages = {width: EMA(network, power_decay(width)) for width in widths}
    found = {}
    for time, value in enumerate(path, start=1):
        nn.init.constant_(network.weight, float(value))
        for width, average in averages.items():
            average.update()
            if time in stored_at:
                found[time, width] = float(average.weights()["weight"])
    return found


def test_an_average_of_another_width_and_time_is_reconstructed():
    path = np.cumsum(np.random.default_rng(0).normal(size=400)) + 20
    stored = averages_of(path, [0.05, 0.1], list(range(40, 401, 40)))
    for time, width in ((400, 0.15), (400, 0.07), (320, 0.2)):
        kept = {key: value for key, value in stored.items() if key[0] <= time}
        weights, error = combination(list(kept), (time, width))
        assert weights.sum() == pytest.approx(1)
        true = averages_of(path[:time], [width], [time])[time, width]
        assert weights @ np.array(list(kept.values())) == pytest.approx(true, abs=0.02 * path.std())
        assert error < 0.1
    _, error = combination([(400, 0.05)], (400, 0.2))
    assert error > 0.3, "one narrow average says little of a wide one"


def test_a_stored_average_is_itself():
    weights, error = combination([(100, 0.05), (200, 0.05), (200, 0.1)], (200, 0.1))
    np.testing.assert_allclose(weights, [0, 0, 1], atol=1e-6)
    assert error < 1e-6


def test_states_are_added_by_their_weights():
    states = [
        {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(1)},
        {"w": torch.tensor([3.0, 6.0]), "n": torch.tensor(2)},
    ]
    found = combined([-0.5, 1.5], iter(states))
    assert (found["w"].tolist(), found["w"].dtype, found["n"].item()) == ([4.0, 8.0], torch.float32, 2)
