"""The MDS reader on datasets that mosaicml-streaming 0.13.0 wrote, whole and damaged."""

import json
import os
import shutil
import threading

import fsspec
import numpy as np
import pytest
from conftest import GOLDEN

from microdit_jax.data import mds, shard_files
from microdit_jax.data.mds import MdsReader
from microdit_jax.errors import UserError
from microdit_jax.files import attempts
from microdit_jax.files.attempts import BucketError
from microdit_jax.files.bucket import filesystem
from microdit_jax.prepare.mds_writer import merge_index

NAMES = ("plain", "zstd", "gz", "merged")


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(GOLDEN / "mds", tmp_path / "mds")


def expected(index):
    rng = np.random.default_rng(index)
    shapes = {"caption_latents": (32,), "latents_256": (4, 4, 4), "latents_512": (4, 8, 8)}
    arrays = {
        name: rng.standard_normal(shape).astype("<f2").tobytes() for name, shape in shapes.items()
    }
    return {"caption": f"naïve caption {index}"} | arrays


@pytest.mark.parametrize("name", NAMES)
def test_fixtures_are_read_exactly(folder, name):
    reader = MdsReader(folder / name, check_hashes=name == "gz")
    assert len(reader) == 10
    for index in (*range(10), 3):
        assert reader[index] == expected(index)
    for index in (-1, 10):
        with pytest.raises(IndexError):
            reader[index]


def test_an_empty_dataset_has_no_samples(folder):
    reader = MdsReader(folder / "empty")
    assert len(reader) == 0 and list(reader) == []


def test_compressed_shards_are_unpacked_once(folder):
    MdsReader(folder / "zstd")[9]
    (folder / "zstd/shard.00001.mds.zstd").unlink()
    assert MdsReader(folder / "zstd")[9] == expected(9)
    with pytest.raises(UserError, match="shard.00000.mds.zstd of 3560 bytes, found none"):
        (folder / "zstd/shard.00000.mds.zstd").unlink()
        MdsReader(folder / "zstd")[0]


def test_a_cache_keeps_a_folder_clean(folder, tmp_path):
    reader = MdsReader(folder / "zstd", cache=tmp_path / "cache")
    assert [reader[i] for i in range(10)] == [expected(i) for i in range(10)]
    assert sorted(p.name for p in (folder / "zstd").glob("*.mds")) == []
    assert len(list((tmp_path / "cache").rglob("*.mds"))) == 2


@pytest.fixture
def url(folder):
    """The fixtures in fsspec's memory, and a count of what is fetched from there."""
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(folder), "/fixtures", recursive=True)
    yield "memory://fixtures"
    filesystem.rm("/fixtures", recursive=True)


@pytest.mark.parametrize("name", NAMES)
def test_urls_are_read_through_a_cache_that_stays_small(url, tmp_path, name):
    cache = tmp_path / "cache"
    reader = MdsReader(f"{url}/{name}", cache=cache, cache_bytes=5000, check_hashes=name == "gz")
    for index in (*range(10), *range(9, -1, -1)):
        assert reader[index] == expected(index)
        assert sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) <= 5000
    # what an earlier process left is used, and counted; leftovers of a killed one go, in time
    (kept,) = cache.rglob("*.mds")
    new, old = (kept.with_name(f"shard.0000{i}.mds.1.partial") for i in (8, 9))
    for path in (new, old):
        path.write_bytes(bytes(4000))
    os.utime(old, (0, 0))
    fsspec.filesystem("memory").rm(f"/fixtures/{name}/**/shard.00000*", recursive=True)
    assert MdsReader(f"{url}/{name}", cache=cache, cache_bytes=5000)[0] == expected(0)
    assert list(cache.rglob("*.partial")) == [new]  # another process may be writing it


def test_bad_urls_are_clean_errors(url, tmp_path):
    with pytest.raises(UserError, match="through a cache on a local disk, found no folder"):
        MdsReader(f"{url}/plain")
    with pytest.raises(UserError, match="found nosuch://; copy it"):
        MdsReader("nosuch://x", cache=tmp_path)
    with pytest.raises(UserError, match="found no such file"):
        MdsReader(f"{url}/elsewhere", cache=tmp_path)
    memory = fsspec.filesystem("memory")
    memory.pipe("/fixtures/plain/shard.00000.mds", memory.cat("/fixtures/plain/index.json"))
    with pytest.raises(UserError, match="expected 3970 bytes in memory://.*found 766"):
        MdsReader(f"{url}/plain", cache=tmp_path)[0]
    memory.rm("/fixtures/plain/shard.00000.mds")
    with pytest.raises(UserError, match="could not fetch it"):
        MdsReader(f"{url}/plain", cache=tmp_path)[0]


def test_errors_of_a_filesystem_are_reported_after_more_attempts(url, tmp_path, monkeypatch):
    """Those of gs:// and https:// are no OSErrors."""

    class HttpError(Exception):
        pass

    calls = []

    def cat_file(path, **options):
        calls.append(path)
        if path.endswith(".mds"):
            raise HttpError("503, try\nlater")
        return whole(path)

    memory = filesystem("memory")
    whole = memory.cat_file
    monkeypatch.setattr(memory, "cat_file", cat_file)
    monkeypatch.setattr(attempts, "SECONDS", 0.02)
    monkeypatch.setattr(shard_files, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(attempts, "_FIRST_PAUSE", 0.001)
    reader = MdsReader(f"{url}/plain", cache=tmp_path)
    message = r"could not fetch it \(could not use .*: 503, try later"
    with pytest.raises(UserError, match=message) as caught:
        reader[0]
    assert len(calls) >= 3 and isinstance(caught.value.__cause__, BucketError)
    with pytest.raises(UserError, match=r"could not use .*: 503, try later"):
        shard_files.ShardFiles(f"{url}/plain", cache=tmp_path).read("shard.00000.mds")


def test_threads_read_one_dataset_together(url, tmp_path):
    reader = MdsReader(f"{url}/gz", cache=tmp_path, cache_bytes=5000)
    wrong = []

    def read(seed):
        for index in np.random.default_rng(seed).integers(0, 10, 200):
            try:
                assert reader[int(index)] == expected(index)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


def test_many_shards_do_not_stay_mapped(folder, monkeypatch):
    monkeypatch.setattr(mds, "_MAX_OPEN", 1)
    reader = MdsReader(folder / "plain")
    for index in (0, 9, 1, 8):
        assert reader[index] == expected(index)
        assert len(reader._views) == 1


def entry(folder, number, **hashes):
    """A shard's raw_data in the index, with more hashes."""
    raw = json.loads((folder / "index.json").read_text())["shards"][number]["raw_data"]
    return raw | {"hashes": raw["hashes"] | hashes}


def change_index(folder, number=1, **changes):
    index = json.loads((folder / "index.json").read_text())
    for key, value in changes.items():
        index["shards"][number][key] = value
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"version": 1}, "format 'mds' version 1"),
        ({"format": "csv"}, "format 'csv'"),
        ({"column_encodings": ["str", "pkl", "bytes", "bytes"]}, "pkl runs code"),
        ({"column_encodings": ["str", "what", "bytes", "bytes"]}, "unknown encoding 'what'"),
        ({"column_encodings": ["str", "int8", "bytes", "bytes"]}, "do not fit the encodings"),
        ({"column_names": ["caption", "a", "b", "c"]}, "not sorted"),
        ({"column_names": ["a", "b", "c", "d"]}, "the same columns in all shards"),
        ({"samples": -1}, "a shard of -1 samples"),
        ({"samples": 4}, "expected 4 samples in .*shard.00001.mds, found 5"),
        ({"compression": "rar"}, "compression and zip_data do not fit"),
        ({"raw_data": {"basename": "../x", "bytes": 1, "hashes": {}}}, "outside of the dataset"),
        ({"raw_data": {"basename": "/etc/x", "bytes": 1, "hashes": {}}}, "outside of the dataset"),
        ({"raw_data": {"basename": "x", "bytes": -1, "hashes": {}}}, "a file of -1 bytes"),
        ({"raw_data": None}, "could not use it"),
    ],
)
def test_a_wrong_index_is_named(folder, changes, message):
    change_index(folder / "plain", **changes)
    with pytest.raises(UserError, match=message):
        MdsReader(folder / "plain")[7]


def test_a_shard_that_goes_on_after_its_last_sample_is_damaged(folder):
    path = folder / "plain/shard.00000.mds"
    path.write_bytes(path.read_bytes() + b"x")
    raw = entry(folder / "plain", 0)
    change_index(folder / "plain", number=0, raw_data=raw | {"bytes": raw["bytes"] + 1})
    with pytest.raises(UserError, match="expected rising offsets up to 3971 bytes"):
        MdsReader(folder / "plain")[0]


def test_damage_within_a_value_is_found_by_hashes_alone(folder):
    path = folder / "gz/shard.00000.mds"
    MdsReader(folder / "gz")[0]
    data = bytearray(path.read_bytes())
    data[400] ^= 1
    path.write_bytes(data)
    assert MdsReader(folder / "gz")[0] != expected(0)
    with pytest.raises(UserError, match="expected sha1 9fb5.* found .*copy it again"):
        MdsReader(folder / "gz", check_hashes=True)[0]
    change_index(folder / "gz", number=0, raw_data=entry(folder / "gz", 0, md5="0" * 32))
    path.write_bytes(bytes(data[:400]) + bytes([data[400] ^ 1]) + bytes(data[401:]))
    with pytest.raises(UserError, match="expected md5 0000.* found"):  # each of several
        MdsReader(folder / "gz", check_hashes=True)[0]
    with pytest.raises(UserError, match="expected hashes in .*plain/index.json, found none"):
        MdsReader(folder / "plain", check_hashes=True)


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    if rng.random() < 0.3:
        return data[: rng.integers(len(data))]
    changed = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
    return bytes(changed)


def test_two_thousand_damaged_datasets_give_clean_errors_or_right_shapes(folder):
    """Truncations and bit flips of shards and indices; a flip within a value goes unseen."""
    sizes = {name: len(value) for name, value in expected(0).items()}
    refused = 0
    for trial in range(2000):
        rng = np.random.default_rng(trial)
        victim = folder / NAMES[rng.integers(4)]
        files = [path for path in victim.rglob("*") if path.is_file()]
        index = victim / "index.json"
        # half of the trials damage the index; headers more often than values
        path = index if rng.random() < 0.5 else files[rng.integers(len(files))]
        whole = path.read_bytes()
        if path != index and rng.random() < 0.5:
            path.write_bytes(damage(whole[:320], rng) + whole[320:])
        else:
            path.write_bytes(damage(whole, rng))
        try:
            reader = MdsReader(victim)
            for i in range(min(len(reader), 50)):
                sample = reader[i]
                assert set(sample) == set(sizes)
                for name in sizes.keys() - {"caption"}:
                    assert len(sample[name]) == sizes[name]
        except UserError:
            refused += 1
        finally:
            path.write_bytes(whole)
            for made in victim.rglob("*.mds"):
                if victim.name in ("zstd", "gz"):
                    made.unlink()
    assert 600 < refused < 2000


def test_parts_are_merged(folder):
    (folder / "merged/index.json").unlink()
    with pytest.raises(UserError, match="expected parts"):
        merge_index(folder / "empty")
    with pytest.raises(UserError, match="found no such file.*make a lost one"):
        MdsReader(folder / "merged")
    parts = folder / "parts"
    for part, name in (("0", "gz"), ("1", "empty"), ("2", "plain")):
        shutil.copytree(folder / name, parts / part)
    assert merge_index(parts) == 20
    reader = MdsReader(parts)
    assert [reader[i]["caption"][-1] for i in range(20)] == [str(i % 10) for i in range(20)]
