"""Datasets of strangers through the real command: counted, listed, gone on, nothing outside read.

Every run has 4 GB of address space and 30 s (`support.hostile`); what is refused here crashed,
filled or held up the job before.
"""

import bz2
import gzip
import io
import json
import os
import re
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.hostile import assert_refused, run_hostile
from support.hostile_files import (
    header,
    large_tar,
    lying_bz2,
    padded,
    progressive,
    sparse,
    stored_zip,
    strips,
)
from support.source_files import image, write, write_json, write_tar, write_zip

from microdit_jax.encoders.patch_pca import PatchPCA
from microdit_jax.prepare.mds_writer import MdsWriter

GOOD = image(30)
DEEP = "[" * 100_000
SECRET = "the words of another file"


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers") / "codec"
    rng = np.random.default_rng(0)
    pixels = rng.uniform(-1, 1, (4, 16, 16, 3)).astype(np.float32)
    PatchPCA.fit(pixels, patch=8, channels=4).save(folder)
    return folder


@pytest.fixture
def prepare(codec, tmp_path):
    """Runs the command on tmp_path/"data" and returns what it did, and skipped images by id."""

    def run(source, *options):
        done = run_hostile(
            [
                "-m", "microdit_jax.prepare", f"--source={source}", "--input=data", "--output=out",
                f"--vae={codec}", "--text_encoder=table:width=8,tokens=6,seed=0",
                "--resolutions=16", "--min_size=0", "--threads=8", *options,
            ],
            tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        text = (tmp_path / "out/skipped.jsonl").read_text()
        assert all(line.isprintable() for line in text.splitlines())
        shown = (done.stdout + done.stderr).replace("\n", "").replace("\r", "")
        assert SECRET not in shown and "Traceback" not in shown and "\x1b[2J" not in shown
        report = json.loads((tmp_path / "out/report.json").read_text())
        skipped = [json.loads(line) for line in text.splitlines()]
        assert len(skipped) == report["skipped"]
        return report["records"], [(entry["id"], entry["reason"]) for entry in skipped]

    return run


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


def test_folder(prepare, tmp_path, monkeypatch):
    data = tmp_path / "data"
    secret = write(tmp_path / "outside/secret.txt", SECRET)
    write(tmp_path / "outside/secret.jpg", GOOD)
    script = write(tmp_path / "bin/gs", f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    expected = {}

    def add(name, contents, reason, caption="words"):
        path = data / f"{name}.jpg"
        if contents is not None:
            write(path, contents)
        write(path.with_suffix(".txt"), caption)
        if reason is not None:
            expected[f"{name}.jpg"] = reason
        return path

    add("good", GOOD, None)
    add("postscript", POSTSCRIPT, "not an image")
    add("empty", b"", "not an image")
    add("scans", progressive(3000, 5000), r"a JPEG of 50\d\d scans")
    add("strips", strips(1_000_000), "a TIFF of 1000000 strips")
    sparse(add("sparse", None, "a file of 50000000000 bytes"), 50 * 10**9)
    os.mkfifo(add("pipe", None, "not a regular file"))
    add("zero", None, "outside of the folder").symlink_to("/dev/zero")
    add("linked", None, "outside of the folder").symlink_to(tmp_path / "outside/secret.jpg")
    path = add("words", GOOD, "its caption: outside of the folder")
    path.with_suffix(".txt").unlink()
    path.with_suffix(".txt").symlink_to(secret)
    path = add("waits", GOOD, "its caption: not a regular file")
    path.with_suffix(".txt").unlink()
    os.mkfifo(path.with_suffix(".txt"))
    add("long", GOOD, "a caption of 60,000 characters", "a " * 30_000)
    add("huge", GOOD, "its caption: a file of 20000000 bytes", "a" * 20_000_000)
    add("number", GOOD, r"the caption cannot be cleaned \(ValueError\)", f"&#{'1' * 5000};")
    add("surrogate", GOOD, None, "<b>&#xd800;</b>")
    cleaned: dict[str, str] = dict.fromkeys(("a1a1", "\u00a0 ", "&#1", "1x"), "empty caption")
    cleaned["<b "] = r"the caption cannot be cleaned \(ValueError\)"
    for i, text in enumerate(("1.1.", "a1a1", "x_1", "\u00a0 ", "<b ", "&#1", "1x", "www.")):
        add(f"slow{i}", GOOD, cleaned.get(text), text * (49_000 // len(text)))
    add("\x1b[2J\u202eescape\n", b"", "not an image")
    (data / os.fsdecode(b"\xff.jpg")).write_bytes(GOOD)  # a name that is not UTF-8
    expected["\\udcff.jpg"] = "no caption"
    records, skipped = prepare("folder")
    assert len(skipped) == len(expected), skipped
    for id, reason in skipped:
        assert re.fullmatch(expected[id], reason), (id, reason)
    assert records == len(list(data.glob("*.jpg"))) - len(skipped)
    assert not (tmp_path / "ran").exists()


def test_large_images_are_prepared(prepare, tmp_path):
    """9,999 x 9,999 pixels are as many as threads decode at once: 1 GB, whatever their number."""
    file = io.BytesIO()
    Image.new("L", (9999, 9999), 200).save(file, "PNG", compress_level=1)
    for i in range(2):
        write(tmp_path / f"data/{i}.png", file.getvalue())
        write(tmp_path / f"data/{i}.txt", f"number {i}")
    assert prepare("folder") == (2, [])


def test_tars(prepare, tmp_path):
    data, end = tmp_path / "data", bytes(1024)
    whole = {"good.jpg": GOOD, "good.txt": "words"}
    members = (
        header("good.jpg", len(GOOD)) + padded(GOOD) + header("good.txt", 5) + padded(b"words")
    )
    large_tar(data / "headers.tar", ("x", 6 * 10**9, b"x"))
    names = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
    large_tar(data / "key.tar", *((f"a.{name}", 450 * 10**6, b"0") for name in names))
    large_tar(data / "json.tar", ("a.json", 5 * 10**9, b"0"), ("a.jpg", 0, b"0"))
    deep = {"deep.jpg": GOOD, "deep.json": DEEP, "half.jpg": GOOD}
    deep |= {"half.json": '{"caption": "\\ud800"}', "list.jpg": GOOD, "list.json": "[1]"}
    write_tar(data / "deep.tar", whole | deep | {"a.jpg": POSTSCRIPT, "a.txt": "words"})
    write(data / "cut.tar", members)
    write(data / "damaged.tar", members + b"\1" * 512 + members + end)
    write(data / "more.tar", members + end + members + end)
    write(data / "links.tar", header("l.jpg", 0, b"2") + header("s.jpg", 0, b"S") + members + end)
    write(data / "names.tar", header("\x1b[2J\u202e.jpg", 0) + header("\udcff.jpg", 0) + end)
    write(data / "packed.tar", gzip.compress(members + end)[:-4] + b"1234")
    os.mkfifo(data / "pipe.tar")
    records, skipped = prepare("webdataset")
    assert records == 6
    assert sorted(skipped) == sorted(
        [
            *((f"{name}/", "archive damaged or cut off (ReadError)") for name in
              ("cut", "damaged", "headers", "more")),
            ("packed/", "archive damaged or cut off (BadGzipFile)"),
            ("pipe/", "archive damaged or cut off (UserError)"),
            *((("key/a", "a file of 450000000 bytes"),) * 8),
            ("json/a", "a file of 5000000000 bytes"),
            *((f"deep/{name}", "no caption") for name in ("deep", "half")),
            ("deep/list", "no caption"), ("deep/a", "not an image"),
            ("links/l", "a link in an archive, which is not read"),
            ("links/s", "a sparse file in an archive, which is not read"),
            ("names/\x1b[2J\u202e", "no caption"), ("names/\\xff", "no caption"),
        ]
    )  # fmt: skip


def test_diffusiondb(prepare, tmp_path):
    data = tmp_path / "data"
    names = ("good", "locked", "odd", "long", "crc", "null", "nan", "unsafe", "text")
    prompts = {f"{name}.webp": {"p": f"prompt of {name}"} for name in names} | {"null": None}
    packed = zlib.compress(bytes(10**6), wbits=-15)
    crc, words = zlib.crc32(GOOD), json.dumps(prompts).encode()
    stored_zip(
        data / "part-000001.zip",
        [
            (b"part-000001.json", 0, 0, words, len(words), zlib.crc32(words)),
            (b"locked.webp", 0, 1, GOOD, len(GOOD), crc),
            (b"odd.webp", 99, 0, GOOD, len(GOOD), crc),
            (b"long.webp", 8, 0, packed, 100, 0),
            (b"crc.webp", 0, 0, GOOD, len(GOOD), crc ^ 1),
            *((f"{name}.webp".encode(), 0, 0, GOOD, len(GOOD), crc)
              for name in ("good", "null", "nan", "unsafe", "text")),
        ],
    )  # fmt: skip
    bomb = lying_bz2()
    assert len(bomb) < 10_000 and not any(bz2.BZ2Decompressor().decompress(bomb, 10**6))
    members = [(b"part-000002.json", 12, 0, bomb, 100, 0), (b"b.webp", 12, 0, bomb, 10**6, 0)]
    stored_zip(data / "part-000002.zip", [*members, (b"c.webp", 0, 0, GOOD, len(GOOD), crc)])
    write_zip(data / "part-000003.zip", {"part-000003.json": DEEP, "d.webp": GOOD})
    write(data / "part-000004.zip", b"PK nothing")
    scores = {f"{name}.webp": 0.1 for name in names} | {"null.webp": None, "nan.webp": np.nan}
    columns = {"image_name": list(scores), "image_nsfw": list(scores.values())}
    columns["prompt_nsfw"] = [0.9 if name == "unsafe.webp" else 0.0 for name in scores]
    pq.write_table(pa.table(columns), data / "metadata.parquet")
    records, skipped = prepare("diffusiondb")
    first, unscored = "part-000001/", "without a score of its safety"
    assert records == 2 and skipped == [
        (f"{first}locked", "encrypted"),
        (f"{first}odd", "packed by a method (99) that is not read; use stored or deflated"),
        (f"{first}long", "damaged"), (f"{first}crc", "damaged"), (f"{first}null", unscored),
        (f"{first}nan", "unsafe by its scores"), (f"{first}unsafe", "unsafe by its scores"),
        ("part-000002/part-000002", "damaged"), ("part-000002/b", "damaged"),
        ("part-000002/c", "no caption"),
        ("part-000003/d", "no caption"),
        ("part-000004/", "archive damaged or cut off (BadZipFile)"),
    ]  # fmt: skip


def test_mds(prepare, tmp_path):
    def pil(width, height, mode=b"RGB", pixels=b""):
        return np.array([width, height, len(mode)], "<u4").tobytes() + mode + pixels

    cases = [
        (pil(9, 9, b"RGB", bytes(243)), '"words"', None),
        (pil(0, 0), '"no pixels"', "no pixels|an image .*"),
        (pil(0, 7), '"no pixels"', "no pixels|an image .*"),
        (pil(60_000, 60_000, b"L"), '"enormous"', "more than 100 megapixels"),
        (pil(9, 9, b"\x1b[2J", bytes(9)), '"a strange mode"', r"cannot be decoded \(KeyError\)"),
        (b"", '"empty"', "an?.*|.*buffer.*|.*values.*"),
        (pil(9, 9, b"RGB", bytes(243)), DEEP, "damaged sample: .*"),
        (pil(9, 9, b"RGB", bytes(243)), "{", "damaged sample: .*"),
        (pil(9, 9, b"RGB", bytes(243)), "null", "no caption"),
        (pil(9, 9, b"RGB", bytes(243)), '["the first", "the second"]', None),
    ]
    with MdsWriter(tmp_path / "data", {"image": "pil", "caption": "json"}) as writer:
        for picture, caption, _ in cases:
            writer.write({"image": picture, "caption": caption.encode()})
    records, skipped = prepare("mds")
    expected = {str(i): reason for i, (*_, reason) in enumerate(cases) if reason is not None}
    assert records == len(cases) - len(expected) and [id for id, _ in skipped] == list(expected)
    for id, reason in skipped:
        assert re.fullmatch(expected[id], reason), (id, reason)


def test_annotations_lead_nowhere_else(prepare, tmp_path):
    write(tmp_path / "outside.jpg", GOOD)
    names = ["a.jpg", "../../outside.jpg", str(tmp_path / "outside.jpg"), "b\0.jpg"]
    write(tmp_path / "data/val2014/a.jpg", GOOD)
    rows = [{"image_id": i, "id": i, "caption": "words"} for i in range(len(names))]
    rows += [{"image_id": 9, "id": 9, "caption": None}, {"image_id": 10, "id": 10, "caption": [1]}]
    listed = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    listed += [{"id": 9, "file_name": "a9.jpg"}, {"id": 10, "file_name": "a10.jpg"}]
    write_json(
        tmp_path / "data/annotations/captions_val2014.json",
        {"images": listed, "annotations": rows},
    )
    records, skipped = prepare("coco2014")
    reasons = [reason for _, reason in skipped]
    assert records == 1 and len(skipped) == 5
    assert reasons.count("outside of the folder") == 2 and "no caption" in reasons


def test_inputs_that_cannot_be_used_at_all_are_one_line(tmp_path):
    """Tables of captions and folders, each refused before anything is loaded or written."""
    write(tmp_path / "data/a.jpg", GOOD)
    write(tmp_path / "deep.json", DEEP)
    write(tmp_path / "deep.jsonl", f'{{"file_name": "a.jpg", "caption": "x"}}\n{DEEP}\n')
    sparse(tmp_path / "sparse.csv", 50 * 10**9)
    sparse(tmp_path / "sparse.jsonl", 50 * 10**9)
    sparse(tmp_path / "sparse.json", 50 * 10**9)
    os.mkfifo(tmp_path / "pipe.jsonl")
    write(tmp_path / "columns.jsonl", json.dumps({"\x1b[2J\u202e": 1}))
    write(tmp_path / "secret.jsonl", json.dumps({"file_name": "a.jpg", "caption": SECRET}))
    write(tmp_path / "linked/a.jpg", GOOD)
    (tmp_path / "linked/captions.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (tmp_path / "zero.parquet").symlink_to("/dev/zero")
    tables = [
        *("deep.json", "deep.jsonl", "sparse.csv", "sparse.jsonl", "sparse.json", "pipe.jsonl"),
        *("columns.jsonl", "zero.parquet", "/dev/zero"),
    ]
    script = write(
        tmp_path / "each.py",
        "import sys\n"
        "from microdit_jax.errors import UserError\n"
        "from microdit_jax.prepare.sources.registry import open_source\n"
        "for table in sys.argv[1:]:\n"
        "    try:\n"
        "        open_source('folder', 'data', captions=table)\n"
        "        print('opened')\n"
        "    except UserError as error:\n"
        "        print(error)\n",
    )
    done = run_hostile([str(script), *tables], tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == len(tables), done.stderr[-2000:]
    assert all(line.startswith("expected ") and line.isprintable() for line in lines), lines
    for arguments in (["--input=linked"], ["--input=data", "--captions=/dev/zero"]):
        done = run_hostile(
            ["-m", "microdit_jax.prepare", "--source=folder", "--output=out", *arguments], tmp_path
        )
        assert SECRET not in assert_refused(done)
    assert not (tmp_path / "out").exists()
