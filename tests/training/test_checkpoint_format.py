"""States split into JSON and tensors, and put together again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dmd2.errors import UserError
from dmd2.training.checkpoint_format import (
    Piece,
    Reader,
    describe_part,
    hold,
    pack,
    pieces,
    seal,
    unpack,
    verify,
    write_part,
)

TEXT = st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), max_size=4)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
TENSORS = st.integers(0, 4).map(torch.arange)
KEYS = TEXT | st.integers(-9, 9)
STATES = st.recursive(
    PLAIN | TENSORS,
    lambda part: (
        st.lists(part, max_size=3)
        | st.lists(part, max_size=3).map(tuple)
        | st.dictionaries(KEYS, part, max_size=3).filter(lambda d: len({str(key) for key in d}) == len(d))
    ),
    max_leaves=12,
)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(STATES)
def test_any_state_comes_back_through_json_with_its_types_and_order(state: Any):
    tensors: dict[str, Tensor] = {}
    tree = json.loads(json.dumps(pack(state, "", tensors)))
    assert same(unpack(tree, tensors.__getitem__), state)


def test_two_places_of_one_name_are_refused():
    with pytest.raises(ValueError, match="the state has two tensors with the path /0"):
        pack({0: torch.zeros(1), "0": torch.ones(1)}, "", {})


def test_what_json_cannot_hold_is_refused_with_its_place():
    with pytest.raises(TypeError, match="/optimizer/rate: a checkpoint cannot hold function"):
        pack({"optimizer": {"rate": lambda: 0}}, "", {})


def written(folder: Path, parts: list[dict[str, Piece]], shapes: dict[str, list[int]]) -> Reader:
    """A reader of files that some ranks wrote."""
    files = []
    for rank, part in enumerate(parts):
        path = folder / f"step-00000001-{rank}.safetensors"
        write_part(path, part)
        files.append(describe_part(path, part))
    verify(folder, files)
    return Reader(folder, {"shapes": shapes, "files": files})


def test_rows_of_several_files_are_one_tensor_again(tmp_path: Path):
    whole = torch.arange(14, dtype=torch.bfloat16).view(7, 2)
    parts = [{"x": Piece(whole[a:b].clone(), (a, b))} for a, b in ((0, 3), (3, 6), (6, 7))]
    reader = written(tmp_path, [*parts, {}], {"x": [7, 2]})
    assert torch.equal(reader.read("x"), whole)
    for start in range(8):
        for stop in range(start, 8):
            assert torch.equal(reader._join("x", start, stop), whole[start:stop])


def test_rows_that_no_file_has_are_an_error(tmp_path: Path):
    parts = [{"x": Piece(torch.ones(3, 2), (0, 3))}, {"x": Piece(torch.ones(2, 2), (4, 6))}]
    reader = written(tmp_path, parts, {"x": [6, 2]})
    with pytest.raises(UserError, match="rows 0 to 6 of x are not all in the checkpoint's files"):
        reader.read("x")


@pytest.mark.parametrize("copy", [True, False])
def test_held_copies_are_separate_from_what_trains_on(copy: bool):
    live = torch.zeros(2, 3).T  # not contiguous, which safetensors would refuse
    held = hold(pieces({"x": live}), copy=copy)
    held.wait()
    live += 1
    assert held.pieces["x"].tensor.is_contiguous()
    if copy:
        assert torch.equal(held.pieces["x"].tensor, torch.zeros(3, 2))


def test_seal_notices_any_change_and_no_other_order():
    manifest = seal({"step": 3, "digest": "a", "files": [{"bytes": 1}]})
    assert seal(dict(reversed(manifest.items()))) == manifest
    assert seal({**manifest, "step": 4})["seal"] != manifest["seal"]
