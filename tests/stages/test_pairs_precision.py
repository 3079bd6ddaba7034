"""Pairs are made in the precision that their sampler names."""

from pathlib import Path

import numpy as np
from world import RUNTIME, World

from dmd2.datasets import ShardReader
from dmd2.stages import data


def test_pairs_are_made_in_the_samplers_precision(world: World, tmp_path: Path):
    made = {}
    for precision in ("fp32", "bf16"):
        plan = world.plan(samplers={"ode": {"precision": precision}}, pairs={"num_pairs": 4})
        manifest = tmp_path / precision / "manifest.json"
        data.pairs(plan.pairs, world.teacher, manifest, RUNTIME)
        made[precision] = ShardReader(manifest).read(range(4))
    np.testing.assert_array_equal(made["fp32"]["noise"], made["bf16"]["noise"])
    assert not np.array_equal(made["fp32"]["x0"], made["bf16"]["x0"])
    np.testing.assert_allclose(made["fp32"]["x0"], made["bf16"]["x0"], atol=0.2)
