"""Every MDS encoding gives back what was put in, and reads the library's own bytes."""

import datetime
import decimal
import io
import json

import numpy as np
import pytest
from conftest import GOLDEN
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from microdit_jax.data import mds_encodings
from microdit_jax.data.mds import MdsReader
from microdit_jax.data.mds_encodings import parse

FEW = settings(max_examples=60, deadline=datetime.timedelta(seconds=5), derandomize=True)
SCALARS = sorted(mds_encodings._SCALARS)
ARRAYS = st.sampled_from(SCALARS).flatmap(
    lambda name: hnp.arrays(name, hnp.array_shapes(min_dims=1, max_dims=5, max_side=9))
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
    max_leaves=8,
)


def there_and_back(name, value):
    encoding = parse(name)
    data = encoding.encode(value)
    assert encoding.size in (None, len(data))
    return encoding.decode(memoryview(data))


@FEW
@given(ARRAYS)
@example(np.zeros((1, 300), np.int8))  # an axis that takes two bytes
@example(np.zeros(255, np.int8))
@example(np.zeros(256, np.int8))  # the first that does
@example(np.zeros((1,) * 40, np.uint8))
def test_arrays_of_any_type_and_shape_come_back(array):
    shape = ",".join(map(str, array.shape))
    names = ["ndarray", f"ndarray:{array.dtype.name}", f"ndarray:{array.dtype.name}:{shape}"]
    for name in names:
        np.testing.assert_array_equal(there_and_back(name, array), array, strict=True)
    assert parse(names[2]).size == array.nbytes == len(parse(names[2]).encode(array))


@FEW
@given(ARRAYS)
def test_other_byte_orders_and_strides_are_stored_alike(array):
    expected = parse("ndarray").encode(array)
    assert parse("ndarray").encode(array.astype(array.dtype.newbyteorder(">"))) == expected
    assert parse("ndarray").encode(np.asfortranarray(array)) == expected


@pytest.mark.parametrize("name", SCALARS)
def test_numbers_come_back_as_little_endian_bytes(name):
    @FEW
    @given(hnp.from_dtype(np.dtype(name)))
    def check(value):
        found = there_and_back(name, value)
        np.testing.assert_array_equal(found, value, strict=True)
        assert (
            parse(name).encode(value) == np.array(value, np.dtype(name).newbyteorder("<")).tobytes()
        )

    check()


@FEW
@given(TEXTS, st.integers(), st.floats(allow_nan=False), st.decimals(allow_nan=False), JSON)
def test_texts_and_numbers_as_texts_come_back(text, integer, number, fraction, value):
    assert there_and_back("str", text) == text
    assert there_and_back("str_int", integer) == integer
    assert there_and_back("str_float", number) == number
    assert there_and_back("str_decimal", fraction) == decimal.Decimal(fraction)
    assert there_and_back("json", value) == value
    assert there_and_back("int", integer % 2**63) == integer % 2**63


@FEW
@given(st.binary(), st.lists(st.binary()))
def test_files_and_lists_of_them_come_back(data, files):
    for name in ("bytes", "jpeg", "png"):
        assert there_and_back(name, data) == data
    for name in ("jpeg_array", "jpegarray", "list[jpeg]", "list[png]"):
        assert there_and_back(name, files) == files


@FEW
@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted({"1", *mds_encodings._PIXEL_BYTES} - {"La", "PA", "RGBa"})),
            st.tuples(st.integers(1, 20), st.integers(1, 20)),
            st.integers(0, 2**32 - 1),
        )
    )
)
def test_images_of_any_mode_come_back(specs):
    images = []
    for mode, size, seed in specs:
        noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
        rgb = Image.fromarray(noise)
        grey = rgb.convert("L")
        images.append(
            Image.new(mode, size) if mode in ("I;16", "LAB")
            else grey.convert(mode) if mode in ("1", "I", "F", "LA", "P") else rgb.convert(mode)
        )  # fmt: skip
    for found, image in zip(there_and_back("list[pil]", images), images, strict=True):
        alone = there_and_back("pil", image)
        for back in (found, alone):
            assert (back.mode, back.size) == (image.mode, image.size)
            assert back.tobytes() == image.tobytes()


def test_the_librarys_own_bytes_are_what_is_encoded():
    reader = MdsReader(GOLDEN / "mds/encodings", check_hashes=True)
    for index in range(len(reader)):
        raw, decoded = reader.raw(index), reader[index]
        for name, kind in reader.columns.items():
            assert parse(kind).encode(decoded[name]) == bytes(raw[name]), (index, name, kind)
    assert json.loads(bytes(reader.raw(0)["d_json"])) == reader[0]["d_json"]
    assert Image.open(io.BytesIO(reader[0]["f_jpeg"])).format == "JPEG"
