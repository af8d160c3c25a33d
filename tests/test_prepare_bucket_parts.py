"""Parts of a job in a bucket that several hosts write: which are whole, and what is fetched."""

import json
import uuid

import pytest

from microdit_jax.files import output_folder
from microdit_jax.files.bucket import Bucket
from microdit_jax.files.lock import Held
from microdit_jax.files.spool import Spool
from microdit_jax.prepare import bucket_parts
from microdit_jax.prepare.bucket_parts import BucketParts, parts_in_bucket
from microdit_jax.prepare.claims import Claims

NAMES = [f"{number:06}" for number in range(4)]


class Lock:
    """A lock in memory, in place of gs://'s."""

    held: dict[str, str] = {}

    def __init__(self, url):
        self._url = url

    def read(self):
        text = self.held.get(self._url)
        return None if text is None else Held(text, "1", 0.0)

    def create(self, text):
        return self.held.setdefault(self._url, text) == text

    def replace(self, held, text):
        return False

    def renew(self, held):
        pass

    def remove(self, held):
        self.held.pop(self._url, None)


@pytest.fixture
def url(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bucket_parts, "lock_of", Lock)
    Lock.held.clear()
    return f"memory://{uuid.uuid4().hex}/latents"


def write(bucket, name, *, whole=True):
    bucket.write(f"{name}/shard.00000.mds", b"records")
    bucket.write(f"{name}/report.json", b"{}")
    if whole:
        bucket.write(f"{name}/index.json", b"{}")


def test_a_part_counts_once_its_index_is_there(url):
    bucket = Bucket(url)
    write(bucket, NAMES[0])
    write(bucket, NAMES[1], whole=False)
    with output_folder(url, drop=lambda name: ".mds" in name) as into:
        assert (into.path / NAMES[1]).exists()  # fetched with all else
        parts = BucketParts(into, NAMES)
        assert not (into.path / NAMES[1]).exists()
        assert parts.done(NAMES) == {NAMES[0]}
        assert [parts.is_done(name) for name in NAMES] == [True, False, False, False]
        write(bucket, NAMES[2])  # by another host
        assert parts.done(NAMES) == {NAMES[0], NAMES[2]}
        parts.fetch(parts.done(NAMES))
        local = sorted(p.relative_to(into.path).as_posix() for p in into.path.rglob("*.*"))
        assert local == [f"{n}/{f}.json" for n in (NAMES[0], NAMES[2]) for f in ("index", "report")]
    assert f"{NAMES[1]}/report.json" in bucket.objects()  # what another may be writing stays


def test_claims_in_a_bucket_keep_hosts_apart_and_give_back_what_was_sent(url):
    with output_folder(url) as into:
        parts = BucketParts(into, NAMES)
        write(Bucket(url), NAMES[3])
        with Claims(into.path, NAMES, bucket=parts) as claimed:
            Lock.held[f"{url}/.claims/{NAMES[1]}"] = json.dumps({"host": "elsewhere", "pid": 1})
            given = claimed.available()
            assert [next(given), next(given)] == [0, 2] and list(given) == []
            (into.path / NAMES[0]).mkdir()
            (into.path / NAMES[0] / "index.json").write_text("{}")
            claimed.release(0)
            assert Bucket(url).stat(f"{NAMES[0]}/index.json") is not None
            assert f"{url}/.claims/{NAMES[0]}" not in Lock.held
            assert claimed.left() == 2
        assert list(Lock.held) == [f"{url}/.claims/{NAMES[1]}"]


def test_only_a_store_that_can_keep_claims_has_them(url, tmp_path):
    for place in (url, tmp_path / "local"):
        with output_folder(place) as into:
            assert parts_in_bucket(into, NAMES) is None


def test_an_index_is_not_sent_before_a_shard_that_waits(url):
    with output_folder(url) as into:
        assert isinstance(into, Spool)
        (into.path / "part").mkdir()
        for name in ("part/shard.00000.mds", "part/index.json", "index.json", "other.txt"):
            (into.path / name).write_text("x")
        into._send(lambda name, about: not name.endswith(".mds"))
        assert list(Bucket(url).objects()) == ["other.txt"]
        into.flush()
        assert len(Bucket(url).objects()) == 4
