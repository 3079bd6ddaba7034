"""Names that become folders of results and parts of patterns."""

from pathlib import Path

import pytest

from dmd2.config.reading import load_preset
from dmd2.errors import UserError

FOLDER = Path(__file__).parents[2] / "workflow"


@pytest.mark.parametrize("name", ["ode.5", "a+b", "two words", "a/b", "sampler[1]"])
def test_a_sampler_whose_name_no_pattern_matches_is_refused_with_it(name: str):
    with pytest.raises(UserError, match=r"samplers: '.+': a name may only have letters, digits, - and _") as stop:
        load_preset(FOLDER, "smoke", {"samplers": {name: {"kind": "heun", "num_steps": 5}}})
    assert repr(name) in str(stop.value)
    assert "\n" not in str(stop.value)


def test_plain_names_of_samplers_are_accepted():
    assert (
        "ode-5_b" in load_preset(FOLDER, "smoke", {"samplers": {"ode-5_b": {"kind": "heun", "num_steps": 5}}}).samplers
    )
