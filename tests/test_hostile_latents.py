"""MDS datasets and caches as a stranger may make them: nothing is written or read outside."""

import json
import os
import shutil
import time

import fsspec
import numpy as np
import pytest
from conftest import GOLDEN
from support.hostile import assert_refused, outcomes, run_hostile
from test_hostile_folders import DEEP, edit, write

from microdit_jax.data import compression, mds, shard_files
from microdit_jax.data.mds import MdsReader
from microdit_jax.data.shard_files import ShardFiles
from microdit_jax.errors import UserError
from microdit_jax.files import HeldFolder

READ = "support.readers:read_mds"


def index(change, shard=0):
    return lambda folder: edit(folder / "index.json", lambda found: change(found["shards"][shard]))


def raw(**fields):
    return index(lambda shard: shard["raw_data"].update(fields))


def link_out(folder):
    """The shard is to be unpacked through a link, to where a Python would run it."""
    (folder / "x").symlink_to(folder.parent / "outside")
    raw(basename="x/evil.pth")(folder)


def link_out_as_shard(folder):
    (folder / "x").symlink_to(folder.parent / "outside")
    raw(basename="x/evil.mds")(folder)


def link_in(folder):
    """The packed shard is a link to a file elsewhere."""
    packed = folder / "shard.00000.mds.zstd"
    packed.rename(folder.parent / f"{folder.name}.zstd")
    packed.symlink_to(folder.parent / f"{folder.name}.zstd")


def not_a_shard(folder):
    """Bytes that are no shard: they would take a name of the stranger's choice."""
    data = compression.compress("zstd", b"import os\n" * 300)
    (folder / "shard.00000.mds.zstd").write_bytes(data)
    raw(bytes=3000)(folder)
    index(lambda shard: shard["zip_data"].update(bytes=len(data)))(folder)


def pipe(folder):
    (folder / "shard.00000.mds.zstd").unlink()
    os.mkfifo(folder / "shard.00000.mds.zstd")


def columns(names, encodings, sizes):
    def change(shard):
        shard.update(column_names=names, column_encodings=encodings, column_sizes=sizes)

    return index(change)


HARMS = {
    "3e9 bytes": raw(bytes=3 * 10**9),
    "1e13 bytes": raw(bytes=10**13),
    "1e400 bytes": raw(bytes=10**400),
    "negative": raw(bytes=-1),
    "true bytes": raw(bytes=True),
    "a link out": link_out,
    "a link out, as a shard": link_out_as_shard,
    "a link in": link_in,
    "up": raw(basename="../evil.mds"),
    "absolute": raw(basename="/tmp/evil.mds"),
    "no name": raw(basename=""),
    "a list": raw(basename=["shard"]),
    "zero byte": raw(basename="a\0.mds"),
    "startup file": raw(basename="evil.pth"),
    "no shard": not_a_shard,
    "a pipe": pipe,
    "samples": index(lambda shard: shard.update(samples=10**18)),
    "hashes": raw(hashes={"sha1": 3}),
    "escapes": index(lambda shard: shard.update(format="\x1b]0;\nerror: fine")),
    "huge columns": columns(["a"], ["ndarray:float16:65536,65536,65536,65536"], [0]),
    "many digits": columns(["a"], ["ndarray:float16:" + "9" * 5000], [None]),
    "columns a number": columns(3, 4, 5),
    "columns of lists": columns([["a"]], [["str"]], [None]),
    "code": columns(["a"], ["pkl"], [None]),
    "deep": write("index.json", DEEP),
    "a list at the top": write("index.json", "[]"),
    "no UTF-8": lambda f: (f / "index.json").write_bytes(b"\xff"),
    "a link for an index": lambda f: ((f / "index.json").rename(f.parent / f"{f.name}.json"),
                                      (f / "index.json").symlink_to(f.parent / f"{f.name}.json")),
}  # fmt: skip


@pytest.fixture
def outside(tmp_path):
    (tmp_path / "outside").mkdir()
    return tmp_path / "outside"


def test_datasets(tmp_path, outside):
    names = ["good", *HARMS]
    for name in names:
        shutil.copytree(GOLDEN / "mds" / "zstd", tmp_path / name)
        HARMS.get(name, lambda folder: None)(tmp_path / name)
    here = {path.name for path in tmp_path.iterdir()}
    results = dict(zip(names, outcomes(READ, names, tmp_path), strict=True))
    assert results.pop("good")[0] == 0
    for name, (status, line) in results.items():
        assert status == 2 and line.isprintable() and len(line) < 1200, (name, status, line)
        made = {p.name for p in (tmp_path / name).rglob("*") if p.suffix not in (".zstd", ".json")}
        assert made <= {"x", "shard.00001.mds"}, (name, made)
    assert not list(outside.iterdir()) and here == {path.name for path in tmp_path.iterdir()}


def test_the_command_writes_nothing_outside(tmp_path, outside):
    shutil.copytree(GOLDEN / "mds" / "zstd", tmp_path / "data")
    link_out_as_shard(tmp_path / "data")
    sidecar = {
        "format": "microdit_jax latents", "version": 1, "vae": "v", "text_encoder": "t",
        "latents": {"256": [4, 4, 4]}, "captions": [4, 8],
    }  # fmt: skip
    (tmp_path / "data" / "latents.json").write_text(json.dumps(sidecar))
    command = ["-m", "microdit_jax.prepare.reformat", "--input=data", "--output=out", "--to=mds"]
    line = assert_refused(run_hostile(command, tmp_path))
    assert "x/evil.mds" in line and "a link on the way" in line and not list(outside.iterdir())


SIDECARS = {
    "vae": [1], "text_encoder": None, "attribution": 3, "tokens": "4", "scaling_factor": "x",
    "latents": {"256": [4, 4, 10**12]}, "captions": [4, True], "other": 1,
}  # fmt: skip


def test_sidecars(tmp_path):
    about = {
        "format": "microdit_jax latents", "version": 1, "vae": "v", "text_encoder": "t",
        "latents": {"256": [4, 4, 4]}, "captions": [4, 8],
    }  # fmt: skip
    names = ["good", "deep", "columns", *SIDECARS]
    for name in names:
        shutil.copytree(GOLDEN / "mds" / "zstd", tmp_path / name)
        text = json.dumps(about | {name: SIDECARS[name]} if name in SIDECARS else about)
        if name != "columns":  # without a sidecar, sizes follow from the columns' names
            (tmp_path / name / "latents.json").write_text(DEEP if name == "deep" else text)
        else:
            for shard in (0, 1):
                column = "latents_" + "9" * 5000
                index(lambda s, c=column: s["column_names"].__setitem__(2, c), shard)(
                    tmp_path / name
                )
    results = outcomes("support.readers:read_latents", names, tmp_path)
    results = dict(zip(names, results, strict=True))
    assert results.pop("good")[0] == 0
    for name, (status, line) in results.items():
        assert status == 2 and line.isprintable(), (name, status, line[:500])


def test_a_snapshot_of_the_hub_is_links_into_its_blobs(tmp_path):
    """As huggingface_hub stores it; a link from there to anywhere else is refused."""
    repository = tmp_path / "datasets--me--latents"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123" / "train"
    snapshot.mkdir(parents=True)
    for path in (GOLDEN / "mds" / "plain").iterdir():
        shutil.copy(path, repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../../blobs/{path.name}")
    reader = MdsReader(snapshot)
    assert len([reader[i] for i in range(len(reader))]) == 10
    shutil.move(repository / "blobs" / "shard.00001.mds", tmp_path)
    (repository / "blobs" / "shard.00001.mds").symlink_to(tmp_path / "shard.00001.mds")
    with pytest.raises(UserError, match="found a link that leads out"):
        MdsReader(snapshot)[9]


# ------------------------------------------------------------------ a cache that others can write
@pytest.fixture
def url():
    filesystem = fsspec.filesystem("memory")
    for path in (GOLDEN / "mds" / "gz").iterdir():  # with hashes in its index
        filesystem.pipe(f"/hostile/{path.name}", path.read_bytes())
    yield "memory://hostile"
    filesystem.rm("/hostile", recursive=True)


def cache_of(cache):
    (folder,) = cache.iterdir()
    return folder


def test_a_planted_file_of_the_right_size_is_not_read(url, tmp_path):
    expected = [MdsReader(url, cache=tmp_path)[i] for i in range(10)]
    folder = cache_of(tmp_path)
    assert folder.stat().st_mode & 0o077 == 0
    shard = folder / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert MdsReader(url, cache=tmp_path)[4] == expected[4] and shard.read_bytes() != data


def test_a_link_in_the_cache_is_not_followed(url, tmp_path):
    cache, victim = tmp_path / "cache", tmp_path / "victim"
    MdsReader(url, cache=cache)[0]
    folder, shard = cache_of(cache), cache_of(cache) / "shard.00000.mds"
    victim.write_bytes(shard.read_bytes())
    shard.unlink()
    shard.symlink_to(victim)
    with pytest.raises(UserError, match="found a link on the way"):
        MdsReader(url, cache=cache)[0]
    shutil.rmtree(folder)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    old = elsewhere / "thesis.partial"
    old.write_text("mine")
    os.utime(old, (time.time() - 10**6,) * 2)
    folder.symlink_to(elsewhere)
    with pytest.raises(UserError, match="found a link on the way"):
        MdsReader(url, cache=cache, cache_bytes=1)
    assert os.listdir(elsewhere) == ["thesis.partial"]


def test_another_users_cache_is_not_used(url, tmp_path, monkeypatch):
    MdsReader(url, cache=tmp_path)[0]
    folder = cache_of(tmp_path)
    folder.chmod(0o777)
    ShardFiles(url, cache=tmp_path)
    assert folder.stat().st_mode & 0o022 == 0  # closed to others
    if os.getuid():
        pytest.skip("only root can give files away")
    shard = folder / "shard.00000.mds"
    planted = shard.read_bytes()[:-1] + b"\0"
    shard.write_bytes(planted)
    os.chown(shard, 12345, 12345)
    MdsReader(url, cache=tmp_path)[0]
    assert shard.stat().st_uid == 0 and shard.read_bytes() != planted
    os.chown(folder, 12345, 12345)
    with pytest.raises(UserError, match="this user's own, found it to be user 12345's; give anoth"):
        MdsReader(url, cache=tmp_path)


def test_no_more_is_fetched_than_the_index_says(tmp_path, monkeypatch):
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe("/large/a", b"1" * 100_000)
    asked = []
    real = type(filesystem).cat_file

    def cat_file(self, path, start=None, end=None, **options):
        asked.append((start, end))
        return real(self, path, start=start, end=end, **options)

    monkeypatch.setattr(type(filesystem), "cat_file", cat_file)
    with pytest.raises(UserError, match="expected 100 bytes in memory://large/a, found 101"):
        ShardFiles("memory://large", cache=tmp_path).open("a", 100)
    assert asked == [(0, 101)]
    monkeypatch.setattr(shard_files, "MAX_TEXT", 1000)
    with pytest.raises(UserError, match="at most 1000 bytes in memory://large/a, found more"):
        ShardFiles("memory://large", cache=tmp_path).read("a")
    filesystem.rm("/large", recursive=True)


def test_names_below_a_held_folder(tmp_path):
    folder = HeldFolder(tmp_path)
    with folder.make("a/b/c", memoryview(b"1")) as file:
        assert file.read() == b"1"
    for name in ("", ".", "..", "a/../b", "/etc/passwd", "a//b", "a/b/", "a\0b"):
        with pytest.raises(UserError, match="expected the name of a file below"):
            folder.make(name, memoryview(b"1"))
    with pytest.raises(UserError, match="no good"):
        folder.make("d", memoryview(b"1"), check=refuse)
    assert [name for name, _ in folder.files()] == ["a/b/c"] and folder.open("none") is None
    folder.remove("a/b/c")
    folder.remove("a/b/c")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def refuse():
    raise UserError("no good")


def test_values_that_cannot_be():
    for encoding, data in (
        ("pil", np.array([0, 4, 3], "<u4").tobytes() + b"RGB"),
        ("pil", np.array([4, 0, 3], "<u4").tobytes() + b"RGB"),
        ("json", DEEP.encode()),
        ("json", b'"\\ud800"'),
        ("str_int", b"9" * 5000),
    ):
        with pytest.raises(ValueError):
            mds.mds_encodings.parse(encoding).decode(memoryview(data))
