"""Images in columns: files of Hugging Face and img2dataset, as their own libraries wrote them."""

import contextlib
import io
import json
import random
import re
import shutil
import subprocess
import sys
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import GOLDEN, ROOT
from PIL import Image
from support.source_files import image, read, write, write_json

from microdit_jax.errors import UserError
from microdit_jax.prepare.sources import column_process, parquet_images
from microdit_jax.prepare.sources.caption_choice import CaptionChoice
from microdit_jax.prepare.sources.column_files import read_rows
from microdit_jax.prepare.sources.registry import open_source

RECORDED = GOLDEN / "image_datasets"  # tests/support/write_image_datasets.py
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def open_parquet(path, **options):
    return open_source("parquet", str(path), **options)


def reds(source):
    good, bad = read(source)
    return [(caption, red) for _, caption, red in good], bad


def numbers(*of):
    return [(f"number {i}", 10 * i) for i in of]


def test_hugging_face_parquet():
    folder = RECORDED / "hf_parquet"
    source = open_parquet(folder)
    assert reds(source) == (numbers(*range(8)), [])
    assert source.parts == ["data/train-00000-of-00001.parquet rows 0 to 7"]
    assert source.notes == [
        "columns: images in image, captions in text (of image, text; --image_column and "
        "--caption_column choose)"
    ]
    for path in (f"{folder}/data/*.parquet", f"{folder}/**/*.parquet", folder / "data",
                 folder / "data/train-00000-of-00001.parquet"):  # fmt: skip
        assert reds(open_parquet(path))[0] == numbers(*range(8))


def test_save_to_disk_folders(tmp_path):
    assert reds(open_parquet(RECORDED / "hf_disk", split="test")) == (numbers(6, 7), [])
    assert reds(open_parquet(RECORDED / "hf_disk/train")) == (numbers(*range(6)), [])
    with pytest.raises(UserError, match="has the splits test, train; choose one with --split"):
        open_parquet(RECORDED / "hf_disk")
    with pytest.raises(UserError, match="expected the split 'valid' .* found test, train"):
        open_parquet(RECORDED / "hf_disk", split="valid")
    copy = tmp_path / "train"
    shutil.copytree(RECORDED / "hf_disk/train", copy)
    shutil.copy(copy / "data-00000-of-00001.arrow", copy / "cache-0123.arrow")  # of a transform
    assert reds(open_parquet(copy)) == (numbers(*range(6)), [])
    (copy / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(UserError, match="expected data-00000-of-00001.arrow beside .*state.json"):
        open_parquet(copy)
    write_json(copy / "state.json", {"_data_files": [{"filename": "../x"}]})
    with pytest.raises(UserError, match="leads out"):
        open_parquet(copy)


def test_img2dataset(tmp_path):
    source = open_parquet(RECORDED / "img2dataset_parquet")
    found, bad = reds(source)
    assert sorted(found) == numbers(*range(8))
    assert [reason for _, reason in bad] == ["no image (failed_to_download)"]
    with pytest.raises(UserError, match="expected a column of images .*--source=webdataset"):
        open_parquet(RECORDED / "img2dataset_webdataset")


@pytest.mark.parametrize("name", ["{}.parquet", "default/{}/0000.parquet", "{}/0.parquet"])
def test_splits_by_names_of_files_and_folders(tmp_path, name):
    for i, split in enumerate(("train", "validation")):
        path = tmp_path / name.format(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": [image(10 * i)], "text": [f"number {i}"]}), path)
    with pytest.raises(UserError, match="has the splits train, validation; choose one"):
        open_parquet(tmp_path)
    assert reds(open_parquet(tmp_path, split="validation")) == (numbers(1), [])


def arrow_file(path, table, rows, is_file):
    with (pa.ipc.new_file if is_file else pa.ipc.new_stream)(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


@pytest.mark.parametrize("kind", ["parquet", "arrow file", "arrow stream"])
def test_parts_are_groups_of_rows(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(parquet_images, "_PART", 5)
    rows = [{"img": {"bytes": image(10 * i), "path": None}, "Caption": f"number {i}"}
            for i in range(14)]  # fmt: skip
    table = pa.Table.from_pylist(rows, pa.schema([("img", STRUCT), ("Caption", pa.string())]))
    path = tmp_path / ("x.parquet" if kind == "parquet" else "x.arrow")
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=3)
    else:
        arrow_file(path, table, 3, kind == "arrow file")
    source = open_parquet(tmp_path)
    expected = [range(6), range(6, 12), range(12, 14)]
    assert source.parts == [f"{path.name} rows {r[0]} to {r[-1]}" for r in expected]
    for part, numbers_of in enumerate(expected):
        assert [i.caption for i in source.read(part)] == [f"number {i}" for i in numbers_of]
        assert [i.id for i in source.read(part)] == [f"x/{i}" for i in numbers_of]
    assert reds(source)[0] == numbers(*range(14))
    assert len({source.fingerprint(i) for i in range(3)}) == 3


def test_columns_are_named_or_found(tmp_path):
    data = [image(10 * i) for i in range(3)]
    columns = {
        "a": pa.array(data, pa.large_binary()), "b": pa.array(data[::-1]), "n": pa.array([1, 2, 3]),
        "short": pa.array(["s"] * 3).dictionary_encode(), "long": pa.array([["x", "y"], [], None]),
    }  # fmt: skip
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(UserError, match=r"column of images .* found a \(large_binary\), b"):
        open_parquet(path)
    with pytest.raises(UserError, match="column of captions .* with --caption_column"):
        open_parquet(path, image_column="b")
    for options in ({"image_column": "n"}, {"image_column": "b", "caption_column": "n"}):
        with pytest.raises(UserError, match="expected a column n"):
            open_parquet(path, **options)
    good, _ = reds(open_parquet(path, image_column="b", caption_column="short"))
    assert good == [("s", 20), ("s", 10), ("s", 0)]
    good, bad = read(open_parquet(path, image_column="a", caption_column="long"))
    assert good == [("x/0", "x", 0)] and bad == [("x/1", "no caption"), ("x/2", "no caption")]
    with pytest.raises(UserError, match="--captions_of_a_list must be first or random"):
        open_parquet(path, captions_of_a_list="all")
    with pytest.raises(UserError, match="--source=folder takes no --image_column"):
        open_source("folder", str(tmp_path), image_column="a")


def test_captions_of_a_list_are_the_first_or_any():
    texts = ["a", "b", None, "c"]
    assert CaptionChoice()(texts, "x") == "a"
    found = [CaptionChoice("random", 1)(texts, str(i)) for i in range(300)]
    assert all(80 <= found.count(text) <= 120 for text in "abc")
    assert found == [CaptionChoice("random", 1)(texts, str(i)) for i in range(300)]
    assert found != [CaptionChoice("random", 2)(texts, str(i)) for i in range(300)]
    for value, expected in (
        ([], None),
        (None, None),
        ({"a": 1}, None),
        (3, "3"),
        (b"\xff", "\ufffd"),
    ):
        assert CaptionChoice()(value, "x") == expected


def test_rows_without_images_and_files_beside(tmp_path):
    write(tmp_path / "beside.jpg", image(50))
    values = [{"bytes": None, "path": "beside.jpg"}, {"bytes": None, "path": "/etc/passwd"},
              {"bytes": None, "path": None}, {"bytes": b"", "path": None}, None]  # fmt: skip
    rows = [{"image": value, "text": "words"} for value in values]
    table = pa.Table.from_pylist(rows, pa.schema([("image", STRUCT), ("text", pa.string())]))
    pq.write_table(table, tmp_path / "x.parquet")
    first, second, *bad = open_parquet(tmp_path).read(0)
    assert Image.open(io.BytesIO(first.load())).size == (24, 16)
    with pytest.raises(ValueError, match="outside of the folder"):
        second.load()
    assert [(i.id, i.skip_reason) for i in bad] == [(f"x/{n}", "no image") for n in (2, 3, 4)]


def test_files_that_do_not_belong_together_are_named(tmp_path):
    pq.write_table(pa.table({"image": [b"x"], "text": ["x"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [b"x"], "words": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="columns of .*a.parquet in .*b.parquet too, .* text"):
        open_parquet(tmp_path)
    write(tmp_path / "b.parquet", b"PAR1 nothing")
    with pytest.raises(UserError, match="expected a Parquet or Arrow file at .*b.parquet"):
        open_parquet(tmp_path)
    for options, message in (({"split": "x"}, "--split chooses in a folder"), ({}, "found none")):
        with pytest.raises(UserError, match=message):
            open_parquet(tmp_path / "*.png", **options)


def test_images_in_a_table_of_captions_are_refused(tmp_path):
    write(tmp_path / "a.jpg", image(0))
    table = RECORDED / "hf_parquet/data/train-00000-of-00001.parquet"
    with pytest.raises(UserError, match="found images in its column image; .*--source=parquet"):
        open_source("folder", str(tmp_path), captions=str(table))
    rows = write(tmp_path / "x.jsonl", json.dumps({"image": {"bytes": "x"}, "text": "y"}))
    with pytest.raises(UserError, match="expected names of files .* of type dict"):
        open_source("folder", str(tmp_path), captions=str(rows))


def test_memory_is_bounded_by_a_few_rows(tmp_path):
    """One group of 300 rows of 1 MB; Arrow's own memory, and Python's."""
    data = [bytes([i % 256]) * 10**6 for i in range(300)]
    table = pa.table({"image": data, "text": ["words"] * 300})
    pq.write_table(
        table, tmp_path / "x.parquet", compression="none", use_dictionary=False, write_batch_size=8
    )
    del table, data
    before, most = pa.total_allocated_bytes(), 0
    for row in read_rows(tmp_path / "x.parquet", range(1), ["image", "text"]):
        assert len(row["image"]) == 10**6
        most = max(most, pa.total_allocated_bytes() - before)
    tracemalloc.start()
    assert sum(found.num_bytes for found in open_parquet(tmp_path).read(0)) == 300 * 10**6
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 200 * 10**6 and python < 20 * 10**6


@pytest.mark.parametrize("kind", ["parquet", "arrow file", "arrow stream"])
def test_damage_is_an_error_or_counted(tmp_path, kind):
    rows = [{"image": {"bytes": image(10 * i), "path": None}, "text": f"number {i}"}
            for i in range(8)]  # fmt: skip
    table = pa.Table.from_pylist(rows, pa.schema([("image", STRUCT), ("text", pa.string())]))
    path = tmp_path / "x.parquet"
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=3, write_page_checksum=True)
    else:
        arrow_file(path, table, 3, kind == "arrow file")
    whole, rng, refused = path.read_bytes(), random.Random(0), 0
    for trial in range(150):
        data = bytearray(whole)
        if trial % 3 == 0:
            data = data[: rng.randrange(len(data))]
        else:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            source = open_parquet(path)
            found = [image for part in range(len(source.parts)) for image in source.read(part)]
        except UserError as error:
            assert re.search("expected|could not read", str(error))
            refused += 1
            continue
        assert all(image.skip_reason or len(image.load()) < 10**5 for image in found)
    assert 10 < refused < 150


# ------------------------------------------------------------------ the process that decodes
def _images(path):
    return list(parquet_images.ParquetImages(str(path)).read(0))


def _one_file(tmp_path, rows=5):
    table = pa.table({"image": [b"x%d" % i for i in range(rows)], "caption": ["a"] * rows})
    pq.write_table(table, tmp_path / "x.parquet")
    return tmp_path / "x.parquet"


def test_one_process_reads_file_after_file(tmp_path, monkeypatch):
    column_process.close()
    started = []
    start = subprocess.Popen
    monkeypatch.setattr(
        column_process.subprocess, "Popen", lambda *a, **k: started.append(a) or start(*a, **k)
    )
    path = _one_file(tmp_path)
    for _ in range(3):
        assert [image.load() for image in _images(path)] == [b"x%d" % i for i in range(5)]
    assert len(started) == 1
    # One that is left in the middle is replaced, since its rows still wait.
    with contextlib.closing(parquet_images.ParquetImages(str(path)).read(0)) as images:
        assert next(images).load() == b"x0"
    assert [image.load() for image in _images(path)] == [b"x%d" % i for i in range(5)]
    assert len(started) == 2
    first, second = (parquet_images.ParquetImages(str(path)).read(0) for _ in range(2))
    assert [(a.load(), b.load()) for a, b in zip(first, second, strict=True)] == [
        (b"x%d" % i, b"x%d" % i) for i in range(5)
    ]
    assert len(started) == 3


@pytest.mark.parametrize(
    "body, told",
    [
        ("signal.alarm(1)\nwhile True: pass", "a row took longer than 60 s"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "PyArrow ended with SIGSEGV"),
        ("sys.exit(3)", "PyArrow ended with 3"),
        (
            'print(\'{"rows": [{"fields": {"image": {"bytes": 9}}}]}\\nshort\', end=\'\')',
            "a row was cut",
        ),
    ],
)
def test_a_decoder_that_is_ended_costs_its_rows(tmp_path, monkeypatch, body, told):
    column_process.close()
    path, start = _one_file(tmp_path), subprocess.Popen
    code = f"import os, signal, sys\nsys.stdin.readline()\n{body}"
    with monkeypatch.context() as patch:
        patch.setattr(
            column_process.subprocess,
            "Popen",
            lambda command, **k: start([sys.executable, "-c", code], **k),
        )
        (image,) = _images(path)
    assert image.skip_reason == f"rows 0 to 4 are damaged or too large ({told})"
    assert len(_images(path)) == 5  # the next file has a new process


def test_a_page_that_keeps_the_decoder_busy_for_ever_ends(monkeypatch, tmp_path):
    monkeypatch.setattr(column_process, "ROW_SECONDS", 1)
    shutil.copy(ROOT / "fuzz/corpora/columns/found_endless", tmp_path / "x.parquet")
    (image,) = _images(tmp_path / "x.parquet")
    assert image.skip_reason and image.skip_reason.startswith("rows 0 to 2 are damaged")
