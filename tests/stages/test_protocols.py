"""Protocols as a preset names them."""

from typing import Any

import numpy as np
import pytest
import torch
from world import WORKFLOW, World

from dmd2.config.protocols import PROTOCOLS, describe
from dmd2.errors import UserError
from dmd2.lineage.plan import Plan
from dmd2.report.table_schema import Measured
from dmd2.stages.sample import fields_of
from dmd2.teachers import load_space


def plan(**evaluation: Any) -> Plan:
    return Plan(WORKFLOW, "smoke", {"evaluation": evaluation})


def test_digits_are_measured_by_edms_protocol_alone():
    assert Plan(WORKFLOW, "digits").preset.evaluation.protocols == ("edm",)
    assert describe(("edm",)) == {"edm": {"rounding": "round", "covariance_start": "zeros"}}


def test_images_of_the_first_protocol_keep_their_name():
    assert fields_of(["edm"]) == ["image.png"]
    assert fields_of(["dmd2", "edm"]) == ["image.png", "image_edm.png"]


def test_tables_have_a_place_for_every_protocol():
    assert {f"fid_{name}" for name in PROTOCOLS} <= set(Measured.model_fields)


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["edm", "edm"], r"protocols \['edm', 'edm'\]: one is listed twice"),
        (["clean"], r"`evaluation\.protocols\.0` is 'clean': input should be 'edm', 'dmd2', 'coco10k', 'coco30k'"),
        (["coco10k", "coco10k_released"], "they sample differently; use one of them at a time"),
        ([], r"`evaluation\.protocols` is \[\]"),
    ],
)
def test_mistaken_protocols_stop_the_planning(names: list[str], complaint: str):
    with pytest.raises(UserError, match=complaint):
        plan(protocols=names)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocol_decodes_with_its_rounding(world: World, name: str):
    preset = world.plan().preset
    codec, _ = load_space(preset.teacher, preset.data.model_copy(update={"levels": 256}))
    x0 = torch.tensor([-1.0, -0.9999, 0.0, 0.003, 0.9999]).reshape(5, 1, 1, 1)
    exact = (x0.double().numpy() + 1) * 127.5
    expected = {"round": np.floor(exact + 0.5), "truncate": np.floor(exact)}[PROTOCOLS[name].rounding]
    found = codec.decode(x0, rounding=PROTOCOLS[name].rounding)
    np.testing.assert_array_equal(found.ravel(), expected.ravel())
