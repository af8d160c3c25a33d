"""Tars by the webdataset library's rules, and no member of an archive that is not counted."""

import io
import itertools
import json
import random
import shutil
import tarfile

import pytest
from conftest import GOLDEN
from PIL import Image, features
from support.source_files import image, read, write, write_tar

from microdit_jax.errors import UserError
from microdit_jax.prepare.sources.archives import members
from microdit_jax.prepare.sources.registry import open_source
from microdit_jax.prepare.sources.webdataset import expand_braces

RECORDED = GOLDEN / "image_datasets"  # tests/support/write_image_datasets.py


def open_tars(path, **options):
    return open_source("webdataset", str(path), **options)


def numbers(*of):
    return [(f"number {i}", 10 * i) for i in of]


def test_the_librarys_own_shards():
    """Keys with folders, `image.jpg` as an image's ending, captions in the json's prompt."""
    good, bad = read(open_tars(RECORDED / "webdataset"))
    assert [found[1:] for found in good] == numbers(*range(8)) and not bad
    assert [found[0] for found in good] == [f"{i // 5:05}/folder{i % 2}/shot_{i}" for i in range(8)]


def test_img2datasets_own_shards():
    good, bad = read(open_tars(RECORDED / "img2dataset_webdataset"))
    assert sorted(found[1:] for found in good) == numbers(*range(8)) and not bad


def test_members_of_a_key_need_not_be_adjacent(tmp_path):
    files = {f"{i}.jpg": image(10 * i) for i in range(4)}
    files |= {"a0/img.jpg": image(40), "a1/img.jpg": image(50), "a1/img.txt": "number 5"}
    files |= {f"{i}.txt": f"number {i}" for i in range(4)} | {"a0/img.txt": "number 4"}
    for name, mode in (("x.tar", "w"), ("y.tar.gz", "w:gz"), ("z.tgz", "w:gz")):
        path = write_tar(tmp_path / name, files, mode)
        good, bad = read(open_tars(path))
        assert [found[1:] for found in good] == numbers(*range(6)) and not bad
        assert good[4][0] == f"{name[0]}/a0/img"


def test_endings_after_the_first_dot(tmp_path):
    files = {
        "one.image.jpg": image(10), "one.caption": "by caption",
        "two.0.jpg": image(20), "two.json": '{"text": "by text"}',
        "pair.input.jpg": image(30), "pair.output.jpg": image(40), "pair.edit.txt": "make it red",
        "shot_1.5x_0005.jpg": image(50), "shot_1.5x_0005.txt": "five",
        "shot_1.5x_0006.jpg": image(60), "shot_1.5x_0006.txt": "six",
        "UP.JPG": image(70), "UP.TXT": "in capitals", "j.jfif": image(80), "j.txt": "jfif",
    }  # fmt: skip
    path = write_tar(tmp_path / "x.tar", files)
    good, bad = read(open_tars(path))
    assert good == [
        ("x/one", "by caption", 10), ("x/two", "by text", 20), ("x/pair", "make it red", 30),
        ("x/shot_1.5x_0005", "five", 50), ("x/shot_1.5x_0006", "six", 60),
        ("x/UP", "in capitals", 70), ("x/j", "jfif", 80),
    ]  # fmt: skip
    assert bad == [("x/pair", "another image of the same key")]
    good, bad = read(open_tars(path, image_column="output.jpg", caption_column="edit.txt"))
    assert good == [("x/pair", "make it red", 40)] and len(bad) == 7


def test_captions_in_fields_and_lists(tmp_path):
    fields = {"caption": ["a", "b"], "long": "long words", "prompt": "p"}
    files = {}
    for i in range(60):
        files |= {f"{i}.jpg": image(0), f"{i}.json": json.dumps(fields)}
    path = write_tar(tmp_path / "x.tar", files)
    captions = {
        choice: [c for _, c, _ in read(open_tars(path, captions_of_a_list=choice, seed=3))[0]]
        for choice in ("first", "random")
    }
    assert captions["first"] == ["a"] * 60 and 15 < captions["random"].count("b") < 45
    assert read(open_tars(path, caption_column="long"))[0][0][1] == "long words"


def test_folders_lists_and_patterns_of_tars(tmp_path):
    for i, name in enumerate(("a/00000", "a/00001", "b/00000")):
        write_tar(tmp_path / f"{name}.tar", {"k.jpg": image(10 * i), "k.txt": f"number {i}"})
    for pattern, expected in (
        ("", {"a/00000/k": 0, "a/00001/k": 1, "b/00000/k": 2}),
        ("{a,b}/00000.tar", {"a/00000/k": 0, "b/00000/k": 2}),
        ("a/{00000..00001}.tar", {"00000/k": 0, "00001/k": 1}),
        ("*/*.tar", {"a/00000/k": 0, "a/00001/k": 1, "b/00000/k": 2}),
        ("a/00001.tar", {"00001/k": 1}),
    ):
        good, _ = read(open_tars(tmp_path / pattern))
        assert {id: red // 10 for id, _, red in good} == expected
    with pytest.raises(UserError, match="expected a tar at .*a/00002.tar"):
        open_tars(tmp_path / "a/{00000..00002}.tar")
    with pytest.raises(UserError, match="at most 1,000,000 names"):
        expand_braces("{0..9999}{0..9999}")
    assert expand_braces("x{08..11}y{b,a}{z}") == [
        f"x{i}y{c}{{z}}" for i in ("08", "09", "10", "11") for c in "ba"
    ]


def test_what_has_no_image_is_counted(tmp_path):
    avif = io.BytesIO()
    if features.check("avif"):
        Image.new("RGB", (24, 16), (90, 0, 0)).save(avif, "AVIF")
    files = {
        "a.heic": b"x", "a.txt": "words", "b.txt": "alone", "c.mp4": b"x", "c.json": "{}",
        "README": "x", ".DS_Store": "x", "d.avif": avif.getvalue(), "d.txt": "nine",
        "e.jpg": image(0), "e.png": image(0, "PNG"), "e.txt": "e",
    }  # fmt: skip
    good, bad = read(open_tars(write_tar(tmp_path / "x.tar", files)))
    assert bad == [
        ("x/a", "a format that is not read (.heic)"), ("x/b", "no image (.txt)"),
        ("x/c", "no image (.json, .mp4)"), ("x/README", "no image (no ending)"),
        ("x/.DS_Store", "no image (no ending)"),
        *([] if features.check("avif") else [("x/d", "a format that is not read (.avif)")]),
        ("x/e", "another image of the same key"),
    ]  # fmt: skip
    expected = [("x/d", "nine", 90)] if features.check("avif") else []
    assert good == [*expected, ("x/e", "e", 0)]
    write(tmp_path / "loose/a.HEIC", b"x")
    write(tmp_path / "loose/b.jfif", image(20))
    write(tmp_path / "loose/b.txt", "bee")
    good, bad = read(open_source("folder", str(tmp_path / "loose")))
    assert good == [("b.jfif", "bee", 20)]
    assert bad == [("a.HEIC", "a format that is not read (.heic)")]


@pytest.mark.parametrize("seed", range(8))
def test_nothing_vanishes_in_any_order(tmp_path, seed):
    """Images found are as many as image members, whatever lies where and how often."""
    rng = random.Random(seed)
    endings = ["jpg", "png", "txt", "json", "caption", "x.jpg", "x.txt", "cls", "heic", ""]
    names = [f"{key}.{end}".rstrip(".") for key, end in itertools.product("abcde", endings)]
    names = rng.choices(names, k=40)
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in names:
            data = b'{"caption": "words"}' if name.endswith("json") else image(0)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert [m.name for m in members(tmp_path / "x.tar")] == names
    found = list(open_tars(tmp_path / "x.tar").read(0))
    pictured = [name for name in names if name.endswith(("jpg", "png", "heic"))]
    alone = {name[0] for name in names} - {name[0] for name in pictured}
    assert len(found) == len(pictured) + len(alone)
    usable = [image.id for image in found if image.skip_reason is None]
    assert len(set(usable)) == len(usable)


def test_an_archive_that_changes_while_it_is_read_is_told(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "x.tar", {"a.jpg": image(0), "a.txt": "a", "b.jpg": image(0)})
    less = write_tar(tmp_path / "less/x.tar", {"a.jpg": image(0), "a.txt": "a"})
    source = open_tars(path)
    survey = type(source)._survey

    def changed(self, archive):
        keys = survey(self, archive)
        shutil.copy(less, path)
        return keys

    monkeypatch.setattr(type(source), "_survey", changed)
    found = [(image.id, image.skip_reason) for image in source.read(0)]
    assert found == [("x/a", None), ("x/", "the archive changed while it was read")]
