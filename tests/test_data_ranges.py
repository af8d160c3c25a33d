"""Records of a dataset at a URL, each read by a range of its own, and when they are."""

import types

import fsspec
import numpy as np
import pytest
from conftest import GOLDEN

from microdit_jax.data import pipeline
from microdit_jax.data.mds import MdsReader
from microdit_jax.data.stores import open_latents
from microdit_jax.errors import UserError
from microdit_jax.files import attempts, bucket, ranges
from microdit_jax.files.attempts import BucketError
from microdit_jax.files.ranges import Range, RangeReader
from microdit_jax.xla.bench import loader


@pytest.fixture
def reads(monkeypatch):
    """A store in memory, and which bytes were read of it: lists of (name, first, end)."""
    filesystem = bucket.filesystem("memory")
    filesystem.put(str(GOLDEN / "mds"), "/fixtures", recursive=True)
    whole, found = filesystem.cat_file, []

    def cat_file(path, start=0, end=None):
        found.append((path.rpartition("/")[2], start, end))
        return whole(path, start=start, end=end)

    monkeypatch.setattr(filesystem, "cat_file", cat_file)
    yield found
    fsspec.filesystem("memory").rm("/fixtures", recursive=True)


def samples(reader):
    return [{name: bytes(data) for name, data in reader.raw(i).items()} for i in range(len(reader))]


# ---------------------------------------------------------------- what is chosen
def test_single_records_are_read_where_the_dataset_is_larger_than_the_cache(reads, tmp_path):
    expected = samples(MdsReader(GOLDEN / "mds" / "plain"))
    reader = MdsReader("memory://fixtures/plain", cache=tmp_path, cache_bytes=5000, shuffled=True)
    assert "more than the cache holds (0.0 GB): single records are read" in reader.way
    reads.clear()
    several = [9, 0, 3, 9]
    found = [{n: bytes(d) for n, d in raw.items()} for raw in reader.raws(several)]
    assert found == [expected[i] for i in several]
    assert len([r for r in reads if r[1] == 0]) == 2  # the head of each shard, once
    sizes = [end - start for _, start, end in reads if start]
    reads.clear()
    assert samples(reader) == expected
    assert len(reads) == 10 and sum(sizes) < 4 * 1000
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_without_a_cache_too_and_with_none_for_whole_shards_it_is_refused(reads, tmp_path):
    assert "without a cache" in MdsReader("memory://fixtures/plain", shuffled=True).way
    for shuffled in (False, True):
        name = "gz" if shuffled else "plain"
        with pytest.raises(UserError, match="through a cache on a local disk, found no folder"):
            MdsReader(f"memory://fixtures/{name}", shuffled=shuffled)


def test_what_fits_and_what_is_compressed_is_kept_whole(reads, tmp_path):
    url, small = "memory://fixtures", {"cache_bytes": 5000, "shuffled": True}
    fits = MdsReader(f"{url}/plain", cache=tmp_path / "a", shuffled=True)
    assert fits.way.endswith("kept in the cache")
    packed = MdsReader(f"{url}/gz", cache=tmp_path / "b", **small)
    assert "shards are compressed, so a whole shard is fetched for each record" in packed.way
    for reader in (fits, packed):
        assert len(reader.raws([0, 9, 5])) == 3
    assert len([p for p in (tmp_path / "a").rglob("*.mds")]) == 2
    assert MdsReader(GOLDEN / "mds" / "plain", shuffled=True).way == ""


def test_damaged_offsets_and_records_are_errors(reads):
    memory = fsspec.filesystem("memory")
    path = "/fixtures/plain/shard.00000.mds"
    good = memory.cat(path)
    offsets = np.frombuffer(good, "<u4", 3, offset=4)

    def damaged(at, value):
        memory.pipe(path, good[:at] + int(value).to_bytes(4, "little") + good[at + 4 :])
        return MdsReader("memory://fixtures/plain", shuffled=True)

    with pytest.raises(UserError, match="samples in memory://.*in its header"):
        damaged(0, 99).raw(0)
    with pytest.raises(UserError, match="expected rising offsets up to 3970 bytes"):
        damaged(8, 1).raw(0)
    with pytest.raises(UserError, match=r"bytes in sample 0 of memory://.*, found columns of"):
        damaged(offsets[0], 1).raw(0)
    memory.pipe(path, good[: offsets[1]])
    reader = MdsReader("memory://fixtures/plain", shuffled=True)
    with pytest.raises(BucketError, match="the file was cut off or replaced"):
        reader.raws([0, 1])


def test_batches_are_those_of_the_same_dataset_on_a_disk(tmp_path):
    loader.make(tmp_path / "latents", 40)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "latents"), "/here", recursive=True)
    try:
        opened = [
            open_latents(tmp_path / "latents", resolution=256),
            open_latents("memory://here", resolution=256, shuffled=True),
        ]
        assert [source.way != "" for source in opened] == [False, True]
        streams = [
            pipeline.batches(
                pipeline.make_dataset([source], seed=1, batch_size=16, caption_drop=0.1),
                3,
                threads=threads,
            )
            for source, threads in zip(opened, (0, 2), strict=True)
        ]
        for _ in range(4):
            local, far = map(next, streams)
            assert local.keys() == far.keys()
            for name in local:
                np.testing.assert_array_equal(local[name], far[name], name)
        for stream in streams:
            stream.close()
    finally:
        memory.rm("/here", recursive=True)


# ---------------------------------------------------------------- tensorstore, and what it cannot
class Fast:
    """Stands for tensorstore's view of a folder; fails as often as it is told to."""

    def __init__(self, failures):
        self.failures, self.asked = failures, 0

    def read(self, name, *, byte_range):
        def result(timeout):
            self.asked += 1
            if self.failures:
                self.failures -= 1
                raise ValueError("UNAVAILABLE")
            return types.SimpleNamespace(
                state="value", value=bytes(range(byte_range.start, byte_range.stop))
            )

        return types.SimpleNamespace(result=result)


@pytest.fixture
def opened(monkeypatch):
    filesystem = bucket.filesystem("memory")
    filesystem.pipe("/ranges/x", bytes(range(256)))
    reader = RangeReader("memory://ranges")

    def with_store(store):
        monkeypatch.setattr(ranges, "_open", lambda url: store)
        return reader

    yield with_store
    filesystem.rm("/ranges", recursive=True)


WANTED = [Range("x", i, i + 3) for i in range(20)]


@pytest.mark.parametrize("failures", [0, 1, 20])
def test_what_tensorstore_cannot_read_for_a_while_is_read_in_order(opened, failures, capsys):
    fast = Fast(failures)
    reader = opened(fast)
    assert reader.read(WANTED) == [bytes(range(i, i + 3)) for i in range(20)]
    assert fast.asked == 20 + max(0, failures - 1)  # the first by fsspec, the rest once more
    assert capsys.readouterr().err == ""


def test_where_tensorstore_reads_nothing_fsspec_reads_all_and_says_so_once(opened, capsys):
    reader = opened(Fast(10**9))
    for _ in range(2):
        assert reader.read(WANTED) == [bytes(range(i, i + 3)) for i in range(20)]
    assert reader._fast is None
    assert capsys.readouterr().err.count("tensorstore cannot read x, but fsspec can") == 1


def test_what_nobody_can_read_is_one_error(opened, monkeypatch):
    monkeypatch.setattr(attempts, "SECONDS", 0.0)
    with pytest.raises(BucketError, match="memory://ranges/none: there is no such object"):
        opened(Fast(10**9)).read([Range("none", 0, 1)] * 3)
