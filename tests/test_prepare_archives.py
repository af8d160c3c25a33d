"""Archives of captioned images: a miniature of every layout as it is published, whole and not."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.source_files import image, read, write, write_json, write_tar, write_zip

from microdit_jax.errors import UserError
from microdit_jax.prepare.sources.registry import open_source


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
    files |= {"000000003.JPG": image(60), "000000003.TXT": "in capitals"}
    write_tar(tmp_path / "00000.tar", files)
    source = open_source("webdataset", str(tmp_path))
    assert list(source.parts) == ["00000.tar", "00001.tar"]
    good, bad = read(source)
    assert good == [
        ("00000/000000000", "caption 000000000", 0),
        ("00000/000000001", "other", 10),
        ("00000/000000003", "in capitals", 60),
        ("00001/000010000", "caption 000010000", 30),
    ]
    assert bad == [("00000/000000002", "no caption")]


def test_damaged_archives_give_what_is_left(tmp_path):
    path = write_tar(tmp_path / "0.tar", shard("a", "b", "c"))
    path.write_bytes(path.read_bytes()[: 512 * 9])
    write(tmp_path / "1.tar", b"not a tar")
    (tmp_path / "1a.tar").symlink_to(tmp_path / "nowhere")
    write_tar(tmp_path / "2.tar", shard("a", "b") | {"c/a.jpg": image(1), "c/a.txt": "x"})
    good, bad = read(open_source("webdataset", str(tmp_path)))
    assert good[0] == ("0/a", "caption a", 0)
    assert [g[0] for g in good[-3:]] == ["2/a", "2/b", "2/c/a"]
    damaged = [reason for _, reason in bad]
    assert damaged == [
        f"archive damaged or cut off ({kind})"
        for kind in ("ReadError", "ReadError", "FileNotFoundError")
    ]
    source = open_source("webdataset", str(tmp_path))
    assert len({source.fingerprint(part) for part in range(4)}) == 4


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
    prompts = {f"{n}.webp": {"p": f"prompt {n}", "se": 1, "c": 7.0} for n in ("a", "b", "d")}
    files = {"a.webp": image(10, "WEBP"), "b.webp": image(20, "WEBP")}
    files |= {"c.webp": image(30, "WEBP"), "d.webp": image(60, "WEBP")}
    files |= {"part-000001.json": json.dumps(prompts)}
    write_zip(part / "part-000001.zip", files)
    write(part / "part-000002/a2.webp", image(40, "WEBP"))
    write_json(part / "part-000002/part-000002.json", {"a2.webp": {"p": "two"}})
    write(part / "part-000003.zip", b"PK nothing")
    columns = {
        "image_name": ["a.webp", "b.webp", "c.webp", "d.webp", "a2.webp"],
        "image_nsfw": [0.1, 0.3, 0.0, 0.0, 0.2],
        "prompt_nsfw": [0.0, 0.0, 0.1, 0.3, 0.2],
        "prompt": ["", "", "", "", ""],
    }
    with pytest.raises(UserError, match="expected metadata-large.parquet"):
        open_source("diffusiondb", str(tmp_path))
    pq.write_table(pa.table(columns), tmp_path / "metadata-large.parquet")
    good, bad = read(open_source("diffusiondb", str(tmp_path)))
    assert good == [("part-000001/a", "prompt a", 10), ("part-000002/a2", "two", 40)]
    assert bad[:3] == [
        ("part-000001/b", "unsafe by its scores"), ("part-000001/c", "no caption"),
        ("part-000001/d", "unsafe by its scores"),
    ]  # fmt: skip
    assert bad[3][1] == "archive damaged or cut off (BadZipFile)"
