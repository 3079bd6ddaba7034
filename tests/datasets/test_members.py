import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dmd2.datasets import members

NUMBERS = st.sampled_from([np.uint8, np.int64, np.float16, np.float32, np.bool_, np.dtype(">f4")])


@settings(max_examples=60, deadline=None)
@given(
    NUMBERS.flatmap(
        lambda dtype: arrays.arrays(
            dtype,
            arrays.array_shapes(min_dims=0, max_dims=4, max_side=5),
            elements={"allow_nan": False, "allow_infinity": False} if np.dtype(dtype).kind == "f" else None,
        )
    )
)
def test_arrays_come_back_with_their_dtype_shape_and_values(value: np.ndarray) -> None:
    back = members.decode("latent.npy", members.encode("latent.npy", value), members.layout_of(value))
    assert back.dtype == value.dtype.newbyteorder("=")
    np.testing.assert_array_equal(back, value)


@pytest.mark.parametrize("text", ["", "a red fox", "naïve “café”", "two\nlines", "x" * 10_000])
def test_captions_come_back_as_they_were_and_together_as_texts(text: str) -> None:
    value = np.asarray(text)
    layout = members.layout_of(value)
    assert layout == {"dtype": "text", "shape": []}
    data = members.encode("txt", value)
    assert data == text.encode()
    assert members.decode("txt", data, layout).item() == text
    assert members.stack("txt", [data, b"other"], layout).tolist() == [text, "other"]


@pytest.mark.parametrize("kind", ["png", "webp"])
@pytest.mark.parametrize("channels", [1, 3])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_images_are_stored_without_loss(kind: str, channels: int, data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 17)), data.draw(st.integers(1, 17))
    image = data.draw(arrays.arrays(np.uint8, (height, width, channels)))
    field = f"image.{kind}"
    back = members.decode(field, members.encode(field, image), members.layout_of(image))
    np.testing.assert_array_equal(back, image)


def test_transposed_values_come_back_in_their_own_order() -> None:
    value = np.arange(6, dtype=np.float32).reshape(2, 3).T
    back = members.decode("latent.npy", members.encode("latent.npy", value), members.layout_of(value))
    np.testing.assert_array_equal(back, value)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("x0.npy", np.array([0.0, np.nan], np.float32), "NaN"),
        ("x0.npy", np.array([np.inf], np.float16), "infinity"),
        ("x0.npy", np.array([{"a": 1}], object), "object"),
        ("x0.pickle", np.zeros(2), "unknown way"),
        ("image.png", np.zeros((4, 4), np.uint8), "shape"),
        ("image.webp", np.zeros((4, 4, 3), np.float32), "uint8"),
        ("cls", np.zeros(2, np.int64), "one int64"),
        ("cls", np.asarray("a fox"), "not numbers"),
        ("txt", np.asarray(3), "one text"),
        ("txt", np.asarray(["a", "b"]), "one text"),
        ("txt", np.asarray("\ud800"), "surrogates not allowed"),
    ],
)
def test_values_that_cannot_be_stored_are_refused_with_the_rule(field: str, value: np.ndarray, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        members.encode(field, value)


def test_an_npy_header_as_another_program_writes_it_is_read() -> None:
    value = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    stream = io.BytesIO()
    np.lib.format.write_array(stream, value, version=(2, 0))
    back = members.decode("latent.npy", stream.getvalue(), members.layout_of(value))
    np.testing.assert_array_equal(back, value)


def test_an_npy_member_cut_short_is_refused() -> None:
    data = members.encode("x0.npy", np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match=r"size|reshape"):
        members.decode("x0.npy", data[:-4], {"dtype": "float32", "shape": [2, 3]})


def test_another_shape_or_dtype_than_the_layout_is_refused() -> None:
    data = members.encode("x0.npy", np.zeros((1, 3), np.float32))
    for layout in ({"dtype": "float32", "shape": [4, 3]}, {"dtype": "float16", "shape": [1, 3]}):
        with pytest.raises(ValueError, match="expected float"):
            members.decode("x0.npy", data, layout)


class Attack:
    """Makes the folder `path` when unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("dtype", ["float32", "object"])
def test_a_pickle_in_a_member_is_not_executed(dtype: str, tmp_path: Path) -> None:
    stream, trace = io.BytesIO(), tmp_path / "executed"
    np.lib.format.write_array(stream, np.array([Attack(str(trace))], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"allow_pickle|OBJECT"):
        members.decode("x0.npy", stream.getvalue(), {"dtype": dtype, "shape": [1]})
    assert not trace.exists()
    np.lib.format.read_array(io.BytesIO(stream.getvalue()), allow_pickle=True)
    assert trace.exists()  # the attack is a real one
