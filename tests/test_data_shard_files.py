"""A cache of files from elsewhere: what it keeps, in which order it forgets, what it makes anew."""

import os

import fsspec
import pytest

from microdit_jax.data.shard_files import ShardFiles
from microdit_jax.errors import UserError

CONTENTS = {name: name.encode() * 100 for name in "abcd"}  # 100 bytes each


@pytest.fixture
def url():
    filesystem = fsspec.filesystem("memory")
    for name, data in CONTENTS.items():
        filesystem.pipe(f"/shards/{name}", data)
    yield "memory://shards"
    filesystem.rm("/shards", recursive=True)


def read(files, names):
    for name in names:
        with files.open(name, 100) as file:
            assert file.read() == CONTENTS[name]


def kept(cache):
    return {path.name for path in cache.rglob("*") if path.is_file()}


def test_the_file_opened_longest_ago_goes_first(url, tmp_path):
    gone = []
    files = ShardFiles(url, cache=tmp_path, cache_bytes=250, on_evict=gone.append)
    read(files, "abac")  # a was opened again after b
    assert gone == ["b"] and kept(tmp_path) == {"a", "c"}
    read(files, "d")
    assert gone == ["b", "a"] and kept(tmp_path) == {"c", "d"}


def test_of_an_earlier_runs_files_the_oldest_goes_first(url, tmp_path):
    read(ShardFiles(url, cache=tmp_path), "abc")
    for age, name in enumerate("cab"):
        (path,) = tmp_path.rglob(name)
        os.utime(path, (1000 - age, 1000 - age))
    read(ShardFiles(url, cache=tmp_path, cache_bytes=300), "d")
    assert kept(tmp_path) == {"a", "c", "d"}


def test_a_cached_file_of_another_size_is_fetched_again(url, tmp_path):
    read(ShardFiles(url, cache=tmp_path), "a")
    (path,) = tmp_path.rglob("a")
    path.write_bytes(b"cut off")
    read(ShardFiles(url, cache=tmp_path), "a")
    assert path.read_bytes() == CONTENTS["a"]


def test_the_largest_file_stays_while_it_is_read(url, tmp_path):
    read(ShardFiles(url, cache=tmp_path, cache_bytes=10), "ab")
    assert kept(tmp_path) == {"b"}


def test_other_datasets_have_caches_of_their_own(url, tmp_path):
    (tmp_path / "local").mkdir()
    files = ShardFiles(tmp_path / "local", cache=tmp_path / "cache")
    with files.make("a", 1, lambda: b"x") as file:
        assert file.read() == b"x"
    read(ShardFiles(url, cache=tmp_path / "cache"), "a")
    with pytest.raises(UserError, match="expected 99 bytes in memory://shards/b, found 100"):
        ShardFiles(url, cache=tmp_path / "cache").open("b", 99)
