"""Sources of captioned pictures: a miniature of every layout as it is published, whole and not."""

import io
import json
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from microdit_jax.data.mds_writer import MdsWriter
from microdit_jax.data.sources import pictures
from microdit_jax.data.sources.registry import KINDS, open_source
from microdit_jax.errors import UserError


def image(shade, format="JPEG"):
    file = io.BytesIO()
    Image.new("RGB", (24, 16), (shade, 0, 0)).save(file, format)
    return file.getvalue()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def write_json(path, value):
    return write(path, json.dumps(value))


def write_tar(path, files, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            data = data if isinstance(data, bytes) else data.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_zip(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def read(source):
    """(id, caption, red of the first pixel) of all that is usable, and (id, reason) of the rest."""
    good, bad = [], []
    for part in range(len(source.parts)):
        for picture in source.read(part):
            if picture.reason is not None:
                bad.append((picture.id, picture.reason))
                continue
            data = picture.load()
            loaded = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else data
            red = loaded.convert("RGB").getpixel((0, 0))[0]
            good.append((picture.id, picture.caption, round(red / 10) * 10))
    return good, bad


# ---------------------------------------------------------------- folders


def test_a_folder_with_texts(tmp_path):
    write(tmp_path / "b.PNG", image(20, "PNG"))
    write(tmp_path / "b.txt", "bee")
    write(tmp_path / "a/c.jpg", image(30))
    write(tmp_path / "a/c.txt", "sea")
    write(tmp_path / "d.webp", image(40, "WEBP"))
    write(tmp_path / "notes.md", "x")
    good, bad = read(open_source("folder", str(tmp_path)))
    assert good == [("a/c.jpg", "sea", 30), ("b.PNG", "bee", 20)]
    assert bad == [("d.webp", "no caption")]


ROWS = [
    {"file_name": "b.jpg", "caption": 'bee, "b"'},
    {"file_name": "a/c.jpg", "caption": "sea"},
    {"file_name": "b.jpg", "caption": "again"},
    {"file_name": "../x.jpg", "caption": "out"},
]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_a_folder_with_a_table(tmp_path, kind):
    table, rows = tmp_path / f"captions.{kind}", ROWS
    if kind == "jsonl":
        write(table, "\n".join(json.dumps(row) for row in rows) + "\n\n")
    elif kind == "json":
        write_json(table, rows)
    elif kind == "csv":
        write(
            table, 'file_name,caption\nb.jpg,"bee, ""b"""\na/c.jpg,sea\nb.jpg,again\n../x.jpg,out'
        )
    elif kind == "tsv":
        lines = ["file_name\tcaption", *(f"{r['file_name']}\t{r['caption']}" for r in rows)]
        write(table, "\n".join(lines))
    else:
        pq.write_table(pa.Table.from_pylist([*rows, {"file_name": "n.jpg"}]), table)
    write(tmp_path / "b.jpg", image(20))
    write(tmp_path / "a/c.jpg", image(30))
    good, bad = read(open_source("folder", str(tmp_path)))
    assert good == [("b.jpg", 'bee, "b"', 20), ("a/c.jpg", "sea", 30)]
    expected = [("b.jpg", "duplicate id"), ("../x.jpg", "outside of the folder")]
    assert bad == expected + ([("n.jpg", "no caption")] if kind == "parquet" else [])


def test_tables_that_cannot_be_read_are_named(tmp_path):
    for name, data, message in (
        ("a.jsonl", '{"file_name": "b.jpg", "caption": "x"}\n{"file', "after row 1"),
        ("b.jsonl", "[1]\n", "a list in place of a row"),
        ("c.csv", "file_name,caption\nb.jpg\n", "1 values for 2 columns"),
        ("d.parquet", "PAR1", "after row 0"),
        ("e.jsonl", '{"url": "x"}\n', "expected a column file_name or .*found url"),
        ("f.json", "\xff", "after row 0"),
    ):
        table = write(tmp_path / name, data)
        with pytest.raises(UserError, match=message):
            open_source("folder", str(tmp_path), captions=str(table))


# ---------------------------------------------------------------- archives


def shard(*keys, start=0):
    files = {}
    for i, key in enumerate(keys):
        files |= {f"{key}.jpg": image(10 * (start + i)), f"{key}.txt": f"caption {key}"}
        files |= {f"{key}.json": json.dumps({"caption": "other", "url": f"http://{key}"})}
    return files


def test_webdataset_shards(tmp_path):
    write_tar(tmp_path / "00001.tar", shard("000010000", start=3))
    files = shard("000000000", "000000001")
    del files["000000001.txt"]
    files |= {"000000002.jpg": image(50), "000000002.json": "{"}
    write_tar(tmp_path / "00000.tar", files)
    source = open_source("webdataset", str(tmp_path))
    assert list(source.parts) == ["00000.tar", "00001.tar"]
    good, bad = read(source)
    assert good == [
        ("00000/000000000", "caption 000000000", 0),
        ("00000/000000001", "other", 10),
        ("00001/000010000", "caption 000010000", 30),
    ]
    assert bad == [("00000/000000002", "no caption")]


def test_damaged_archives_give_what_is_left(tmp_path):
    path = write_tar(tmp_path / "0.tar", shard("a", "b", "c"))
    path.write_bytes(path.read_bytes()[: 512 * 9])
    write(tmp_path / "1.tar", b"not a tar")
    write_tar(tmp_path / "2.tar", shard("a", "b") | {"c/a.jpg": image(1), "c/a.txt": "x"})
    good, bad = read(open_source("webdataset", str(tmp_path)))
    assert good[0] == ("0/a", "caption a", 0) and [g[0] for g in good[-2:]] == ["2/a", "2/b"]
    assert ("2/a", "duplicate id") in bad
    damaged = [reason for _, reason in bad if reason != "duplicate id"]
    assert damaged == [f"archive damaged or cut off ({kind})" for kind in ("ReadError",) * 2]


def test_cc12m(tmp_path):
    files = shard("000000000", "000000001")
    del files["000000001.txt"]
    files["000000001.json"] = json.dumps({"url": "http://x", "caption": None})
    write_tar(tmp_path / "cc12m-train-0000.tar", files)
    write(tmp_path / "cc12m.tsv", 'http://y\tno\nhttp://x\tfrom the "table\n')
    good, bad = read(open_source("cc12m", str(tmp_path)))
    assert not bad and [caption for _, caption, _ in good] == [
        "caption 000000000", 'from the "table',
    ]  # fmt: skip


def test_sa1b(tmp_path):
    masks = json.dumps({"image": {"image_id": 1}, "annotations": []})
    files = {"./sa_1.jpg": image(10), "./sa_1.json": masks, "./sa_2.jpg": image(20)}
    write_tar(tmp_path / "sa_000000.tar", files | {"./sa_2.json": masks})
    write(tmp_path / "sa_000001/sa_3.jpg", image(30))
    with pytest.raises(UserError, match="expected captions of SA-1B"):
        open_source("sa1b", str(tmp_path))
    write(tmp_path / "captions/sa_1.txt", "one")
    write(tmp_path / "captions/sa_3.txt", "three")
    good, bad = read(open_source("sa1b", str(tmp_path)))
    assert good == [("sa_000000/sa_1", "one", 10), ("sa_000001/sa_3", "three", 30)]
    assert bad == [("sa_000000/sa_2", "no caption")]
    write_json(tmp_path / "captions.json", [{"file_name": "sa_2.jpg", "caption": "two"}])
    good, _ = read(open_source("sa1b", str(tmp_path)))
    assert good == [("sa_000000/sa_2", "two", 20)]


@pytest.mark.parametrize("packed", [True, False])
def test_journeydb(tmp_path, packed):
    split = tmp_path / "data/train"
    files = {"000/x.jpg": image(10), "000/y.jpg": image(20)}
    write_tar(split / "imgs/000.tgz", files, "w:gz")
    write(split / "imgs/001/z.jpg", image(30))
    rows = [
        {"img_path": "./000/x.jpg", "prompt": "ex", "Task2": {"Caption": "no"}},
        {"img_path": "./001/z.jpg", "prompt": "zed"},
        {"img_path": "./002/w.jpg", "prompt": "not here"},
    ]
    lines = "\n".join(map(json.dumps, rows))
    name = "train_anno_realease_repath.jsonl"
    if packed:
        write_tar(split / f"{name}.tgz", {name: lines}, "w:gz")
    else:
        write(split / name, lines)
    good, bad = read(open_source("journeydb", str(tmp_path)))
    assert good == [("000/x", "ex", 10), ("001/z", "zed", 30)]
    assert bad == [("000/y", "no caption")]
    with pytest.raises(UserError, match="expected .*tgz"):
        open_source("journeydb", str(tmp_path), split="valid")


def test_diffusiondb(tmp_path):
    part = tmp_path / "diffusiondb-large-part-1"
    prompts = {f"{n}.webp": {"p": f"prompt {n}", "se": 1, "c": 7.0} for n in ("a", "b")}
    files = {"a.webp": image(10, "WEBP"), "b.webp": image(20, "WEBP")}
    files |= {"c.webp": image(30, "WEBP"), "part-000001.json": json.dumps(prompts)}
    write_zip(part / "part-000001.zip", files)
    write(part / "part-000002/a2.webp", image(40, "WEBP"))
    write_json(part / "part-000002/part-000002.json", {"a2.webp": {"p": "two"}})
    write(part / "part-000003.zip", b"PK nothing")
    columns = {
        "image_name": ["a.webp", "b.webp", "c.webp", "a2.webp"],
        "image_nsfw": [0.1, 0.3, 0.0, 0.2],
        "prompt_nsfw": [0.0, 0.0, 0.1, 0.2],
        "prompt": ["", "", "", ""],
    }
    with pytest.raises(UserError, match="expected metadata-large.parquet"):
        open_source("diffusiondb", str(tmp_path))
    pq.write_table(pa.table(columns), tmp_path / "metadata-large.parquet")
    good, bad = read(open_source("diffusiondb", str(tmp_path)))
    assert good == [("part-000001/a", "prompt a", 10), ("part-000002/a2", "two", 40)]
    assert bad[:2] == [
        ("part-000001/b", "unsafe by its scores"), ("part-000001/c", "no caption"),
    ]  # fmt: skip
    assert bad[2][1] == "archive damaged or cut off (BadZipFile)"


# ---------------------------------------------------------------- annotations


def test_coco2014(tmp_path):
    names = [f"COCO_val2014_{i:012}.jpg" for i in (42, 73)]
    for i, name in enumerate(names):
        write(tmp_path / "val2014" / name, image(10 * i))
    rows = [(73, "a motorbike"), (42, "a shoe"), (73, "again"), (42, "more")]
    data = {
        "images": [{"id": i, "file_name": n} for i, n in zip((42, 73), names, strict=True)],
        "annotations": [{"image_id": i, "id": n, "caption": c} for n, (i, c) in enumerate(rows)],
    }
    path = write_json(tmp_path / "annotations/captions_val2014.json", data)
    good, bad = read(open_source("coco2014", str(tmp_path)))
    assert (
        good
        == [
            ("COCO_val2014_000000000073", "a motorbike", 10),
            ("COCO_val2014_000000000042", "a shoe", 0),
        ]
        and not bad
    )
    write(path, "{}")
    with pytest.raises(UserError, match="captions_val2014.json, could not read .*KeyError"):
        open_source("coco2014", str(tmp_path))


def test_textcaps(tmp_path):
    rows = [("a", "reads stop"), ("a", "second"), ("b", "reads go")]
    data = {"data": [{"image_id": i, "caption_str": c, "reference_strs": []} for i, c in rows]}
    write_json(tmp_path / "TextCaps_0.1_train.json", data)
    write(tmp_path / "train_images/a.jpg", image(10))
    write(tmp_path / "train_images/b.jpg", image(20))
    good, bad = read(open_source("textcaps", str(tmp_path)))
    assert good == [("a", "reads stop", 10), ("b", "reads go", 20)] and not bad
    with pytest.raises(UserError, match="TextCaps_0.1_val.json"):
        open_source("textcaps", str(tmp_path), split="val")


# ---------------------------------------------------------------- other containers


@pytest.mark.parametrize("kind, caption", [("jpeg", "str"), ("pil", "json"), ("bytes", "str")])
def test_mds_of_pictures(tmp_path, kind, caption):
    columns = {"jpg": kind, "caption_llava": caption, "width": "int32"}
    with MdsWriter(tmp_path, columns, size_limit=5000) as writer:
        for i in range(8):
            data = image(10 * i)
            value = Image.open(io.BytesIO(data)).convert("RGB") if kind == "pil" else data
            writer.write({"jpg": value, "caption_llava": f"no. {i}", "width": 24})
    source = open_source("mds", str(tmp_path))
    good, bad = read(source)
    assert good == [(str(i), f"no. {i}", 10 * i) for i in range(8)] and not bad
    with MdsWriter(tmp_path / "other", {"a": "int"}) as writer:
        writer.write({"a": 1})
    with pytest.raises(UserError, match="expected a column of pictures"):
        open_source("mds", str(tmp_path / "other"))


def test_tfds_of_pictures(tmp_path):
    class Mini(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            captions = tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()})
            features = {"image": tfds.features.Image(), "captions": captions}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, manager):
            return {"val": self._generate_examples()}

        def _generate_examples(self):
            for i in range(3):
                file = io.BytesIO(image(10 * i, "PNG"))  # TFDS needs TensorFlow to make a PNG
                yield i, {"image": file, "captions": [{"id": i, "text": f"no. {i}"}]}

    builder = Mini(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    good, bad = read(open_source("tfds", str(builder.data_dir), split="val"))
    assert sorted(g[1:] for g in good) == [(f"no. {i}", 10 * i) for i in range(3)] and not bad
    with pytest.raises(UserError, match="a TFDS dataset with a split 'train'"):
        open_source("tfds", str(builder.data_dir))


def test_emoji():
    train, heldout = (open_source("emoji", split=split) for split in ("train", "heldout"))
    captions = [[p.caption for p in s.read(len(s.parts) - 1)] for s in (train, heldout)]
    assert not set(captions[0]) & set(captions[1]) and "CC-BY" in train.attribution
    assert len(train.parts) == 4 and len(heldout.parts) == 1


# ---------------------------------------------------------------- all of them


def test_a_fraction_is_evenly_spaced_parts():
    listed = [pictures.Picture(str(i), "", None) for i in range(10_500)]
    whole = pictures.ListedPictures(listed)
    assert len(whole.parts) == 11
    some = pictures.Fraction(whole, 0.3)
    assert list(some.parts) == [whole.parts[i] for i in (0, 3, 7)]
    assert [picture.id for picture in some.read(1)] == [str(i) for i in range(3000, 4000)]
    assert len(pictures.Fraction(whole, 0.001).parts) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("laion", "x"), "--source must be one of folder, .* found 'laion'"),
        (("folder", None), "--source=folder needs --input"),
        (("emoji", "x"), "--source=emoji has no --input"),
        (("folder", "/nowhere"), "expected a folder of pictures at /nowhere"),
    ],
)
def test_bad_requests_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        open_source(*arguments)


def test_empty_folders_and_options_that_do_not_fit_are_named(tmp_path):
    for name in KINDS.keys() - {"emoji"}:
        with pytest.raises(UserError, match="expected"):
            open_source(name, str(tmp_path))
    for options, message in (
        ({"fraction": 0.0}, "--fraction must be above 0"),
        ({"split": "test"}, "coco2014 has the splits val, train, found 'test'"),
        ({"cache": "x"}, "--source=coco2014 takes no --cache"),
    ):
        with pytest.raises(UserError, match=message):
            open_source("coco2014", str(tmp_path), **options)
