"""The MDS writer gives mosaicml-streaming's own bytes; every encoding, both ways."""

import decimal
import filecmp
import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import GOLDEN
from PIL import Image

from microdit_jax.data import compression, mds_encodings
from microdit_jax.data.mds import MdsReader
from microdit_jax.errors import UserError
from microdit_jax.prepare.mds_writer import MdsWriter, merge_index

COLUMNS = {"caption": "str", "number": "int32"}


def rewrite(name, folder, **options):
    reader = MdsReader(GOLDEN / "mds" / name, cache=folder.parent / "cache")
    with MdsWriter(folder, reader.columns, **options) as writer:
        for sample in reader:
            writer.write(sample)
    return reader


def test_plain_datasets_are_written_byte_for_byte(tmp_path):
    rewrite("plain", tmp_path / "out", size_limit=4096)
    names = ["index.json", "shard.00000.mds", "shard.00001.mds"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    match, *_ = filecmp.cmpfiles(GOLDEN / "mds/plain", tmp_path / "out", names, shallow=False)
    assert match == names


def test_every_encoding_is_read_and_written_byte_for_byte(tmp_path):
    reader = rewrite("encodings", tmp_path / "out", hashes=["sha1", "xxh64"], size_limit=1 << 16)
    for name in ("index.json", "shard.00000.mds"):
        found, expected = ((p / name).read_bytes() for p in (tmp_path / "out", reader_folder()))
        assert found == expected
    assert {e.split(":")[0] for e in reader.columns.values()} >= {
        *mds_encodings._SCALARS, *mds_encodings._PLAIN.keys() - {"jpegarray"}, "ndarray",
    }  # fmt: skip


def reader_folder():
    return GOLDEN / "mds/encodings"


def test_values_of_every_encoding():
    first, second, third = MdsReader(reader_folder(), check_hashes=True)
    assert third["a_bytes"] == bytes(range(5)) and third["b_str"] == "é漢é漢"
    assert third["c_int"] == -(2**41) and third["d_json"] == {"k": [2, None, "x"]}
    assert [s["e_pil"].mode for s in (first, second, third)] == ["RGB", "L", "CMYK"]
    assert first["e_pil"].size == (5, 4) and first["e_pil"].getpixel((1, 0)) == (12, 16, 20)
    assert Image.open(io.BytesIO(third["f_jpeg"])).format == "JPEG"
    assert Image.open(io.BytesIO(third["g_png"])).mode == "RGBA"
    np.testing.assert_array_equal(third["h_nd"], np.arange(900.0).reshape(3, 300), strict=True)
    np.testing.assert_array_equal(
        second["i_nd"], np.arange(6, dtype="f2").reshape(1, 2, 3) / np.float16(2), strict=True
    )
    np.testing.assert_array_equal(
        third["j_nd"], 2 * np.arange(6, dtype="i4").reshape(2, 3), strict=True
    )
    assert third["k_str_int"] == 10**30 + 2 and third["l_str_float"] == 2 / 3
    assert third["m_str_decimal"] == decimal.Decimal("2.20")
    assert [data[:2] for data in third["n_jpeg_array"]] == [b"\xff\xd8"] * 2
    assert [image.mode for image in third["o_pils"]] == ["RGB", "L"]
    assert len(third["p_jpegs"]) == 2 and third["q_pngs"][0][1:4] == b"PNG"
    assert third["s_uint8"] == 202 and third["s_int64"] == -102 and third["s_float16"] == -102
    assert third["s_float16"].dtype == np.float16


@pytest.mark.parametrize("name", ["br", "br_5", "bz2", "snappy", "zstd_7"])
def test_every_compression_is_read(name, tmp_path):
    reader = MdsReader(GOLDEN / "mds" / name, cache=tmp_path)
    assert list(reader) == [{"caption": f"caption {i}", "number": i} for i in range(6)]


@pytest.mark.parametrize("name", [*compression.NAMES, "zstd:19", "gz:1"])
def test_compressed_datasets_are_written(name, tmp_path):
    with MdsWriter(tmp_path, COLUMNS, compression=name, hashes=["md5"], size_limit=300) as writer:
        for i in range(20):
            writer.write({"caption": "x" * i, "number": i})
    reader = MdsReader(tmp_path, check_hashes=True)
    assert [(len(s["caption"]), s["number"]) for s in reader] == [(i, i) for i in range(20)]
    assert len(reader.shards) > 1 and len(list(tmp_path.glob("*.mds"))) == len(reader.shards)


def test_nothing_looks_finished_before_it_is(tmp_path):
    with pytest.raises(RuntimeError):
        with MdsWriter(tmp_path, COLUMNS, size_limit=300) as writer:
            for i in range(20):
                writer.write({"caption": "x" * i, "number": i})
            raise RuntimeError
    assert list(tmp_path.glob("shard*")) and not (tmp_path / "index.json").exists()
    with MdsWriter(tmp_path / "empty", COLUMNS):
        pass
    assert json.loads((tmp_path / "empty/index.json").read_text()) == {"version": 2, "shards": []}
    with pytest.raises(UserError, match="expected no dataset in .*empty, found an index"):
        MdsWriter(tmp_path / "empty", COLUMNS)


def test_processes_that_end_together_merge_the_same_index(tmp_path):
    with MdsWriter(tmp_path / "0", COLUMNS) as writer:
        writer.write({"caption": "x", "number": 1})
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: merge_index(tmp_path), range(200))) == {1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "index.json"]


@pytest.mark.parametrize(
    "encoding, value, message",
    [
        ("int32", "seven", "invalid literal"),
        ("int32", b"abc", "3 bytes, expected 4"),
        ("uint8", 300, "out of bounds"),
        ("ndarray", np.zeros((0, 3)), r"shape \(0, 3\) cannot be stored"),
        ("ndarray", np.zeros(3, "c8"), "complex64"),
        ("ndarray:float16:2,2", np.zeros((2, 3), "f2"), r"float16\(2, 3\) is not"),
        ("ndarray:float16", np.zeros((2, 3), "f4"), r"float32\(2, 3\) is not"),
        ("json", {1, 2}, "not JSON serializable"),
    ],
)
def test_values_that_do_not_fit_are_refused(encoding, value, message, tmp_path):
    writer = MdsWriter(tmp_path, {"number": encoding})
    with pytest.raises(UserError, match=f"column number cannot hold this value: .*{message}"):
        writer.write({"number": value})


def test_columns_and_options_are_checked(tmp_path):
    writer = MdsWriter(tmp_path, COLUMNS)
    with pytest.raises(UserError, match="expected columns caption, number, found caption"):
        writer.write({"caption": "a"})
    for options in ({"compression": "rar"}, {"hashes": ["crc9"]}):
        with pytest.raises(UserError, match="unknown"):
            MdsWriter(tmp_path, COLUMNS, **options)
    for encoding in ("pkl", "text", "ndarray:complex64", "ndarray:int8:2,0", "ndarray:int8:2:2"):
        with pytest.raises(UserError, match="cannot write"):
            MdsWriter(tmp_path, {"a": encoding})


@pytest.mark.parametrize("encoding", sorted(mds_encodings._PLAIN) + ["ndarray", "ndarray:int8"])
def test_random_bytes_never_crash_a_decoder(encoding):
    rng = np.random.default_rng(0)
    decode = mds_encodings.parse(encoding).decode
    for _ in range(300):
        data = rng.integers(0, 256, rng.integers(0, 40), np.uint8).tobytes()
        try:
            decode(memoryview(data))
        except (ValueError, KeyError, IndexError, TypeError, ArithmeticError):
            continue
