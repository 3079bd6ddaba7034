"""What a row of the log warns of."""

import pytest

from dmd2.stages.train import _alarm

HEALTHY = {"neighbour_ratio": 0.5, "brightness": -0.6, "num_nonfinite": 0.0, "matching_loss": 0.7}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (HEALTHY, None),
        ({"denoising_loss": 0.6}, None),
        (HEALTHY | {"neighbour_ratio": 0.1}, "nearly equal (neighbour ratio 0.100)"),
        ({"neighbour_ratio": 0.1, "num_nonfinite": 0.0}, None),  # of latents, where the threshold says nothing
        (HEALTHY | {"num_nonfinite": 3.0}, "non-finite values, which are replaced by 0"),
    ],
)
def test_collapse_and_values_that_are_not_finite_are_reported(row: dict[str, float], words: str | None):
    reported = _alarm(row)
    assert reported is None if words is None else reported is not None and words in reported
