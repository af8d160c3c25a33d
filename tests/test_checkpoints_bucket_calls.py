"""What Orbax asks of a bucket through epath: tried again, and its answers left as they are."""

import uuid

import pytest
from etils.epath import backend

from microdit_jax.checkpoints import bucket_calls
from microdit_jax.files import attempts
from microdit_jax.files.attempts import BucketError
from microdit_jax.files.bucket import Bucket

URL = "gs://bucket/x"


@pytest.fixture
def pauses(monkeypatch):
    found = []
    monkeypatch.setattr(attempts.time, "sleep", found.append)
    return found


def failing(*errors):
    left = list(errors)

    def call(path, mode=""):
        if left:
            raise left.pop(0)
        return path

    return call


def test_a_fault_that_passes_is_waited_for(pauses, capsys):
    call = bucket_calls._tried(failing(ConnectionResetError("away"), TimeoutError()))
    assert call(URL) == URL
    assert len(pauses) == 2 and capsys.readouterr().err.count("tried again for") == 2


def test_others_reach_the_caller_as_they_are(pauses):
    with pytest.raises(FileNotFoundError, match="no such object"):
        bucket_calls._tried(failing(FileNotFoundError("no such object")))(URL)
    with pytest.raises(ConnectionResetError):
        bucket_calls._tried(failing(ConnectionResetError()))("/local/x")
    assert not pauses


def test_a_store_that_stays_away_is_named(pauses, monkeypatch):
    monkeypatch.setattr(attempts, "SECONDS", 0.0)
    with pytest.raises(BucketError, match="could not use gs://bucket/x: no connection"):
        bucket_calls._tried(failing(ConnectionResetError("away")))(URL)


@pytest.fixture
def url(monkeypatch):
    """A folder in memory that is taken for one of a bucket of gs://."""
    place = f"memory://{uuid.uuid4().hex}"
    monkeypatch.setattr(bucket_calls, "as_given", lambda path: f"{place}/x")
    return place


@pytest.mark.parametrize(("mode", "text"), [("w", "whole\n"), ("wb", b"whole")])
def test_an_object_is_written_when_it_is_closed(url, mode, text):
    opened = bucket_calls._opened(failing())
    with opened(URL, mode) as file:
        file.write(text)
        assert Bucket(url).stat("x") is None
    assert Bucket(url).read("x") == (text if isinstance(text, bytes) else text.encode())
    assert opened(URL, "rb") == URL and opened("/local/x", "w") == "/local/x"


def test_nothing_is_written_of_what_failed(url):
    with pytest.raises(ZeroDivisionError):
        with bucket_calls._opened(failing())(URL, "wb") as file:
            file.write(b"half")
            raise ZeroDivisionError
    assert Bucket(url).stat("x") is None


def test_epath_is_as_it_was_for_local_paths(tmp_path, monkeypatch):
    for name in (*bucket_calls._CALLS, "open"):
        monkeypatch.setattr(backend.fsspec_backend, name, getattr(backend.fsspec_backend, name))
    bucket_calls.try_again.cache_clear()
    bucket_calls.try_again()
    (tmp_path / "a").write_text("a")
    calls = backend.fsspec_backend
    assert calls.exists(str(tmp_path / "a")) and not calls.exists(str(tmp_path / "b"))
    assert calls.listdir(str(tmp_path)) == ["a"]
    with calls.open(str(tmp_path / "a"), "r") as file:
        assert file.read() == "a"
    bucket_calls.try_again.cache_clear()
