"""Folders of object stores, on fsspec's store in memory."""

import errno
import os
import uuid

import pytest

from microdit_jax.errors import UserError
from microdit_jax.files import attempts, check_writable, fetched, output_file, output_folder, spool
from microdit_jax.files.attempts import BucketError, attempt, fault_of
from microdit_jax.files.bucket import Bucket, filesystem
from microdit_jax.files.urls import with_urls


@pytest.fixture
def url(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return f"memory://{uuid.uuid4().hex}/some"


@pytest.fixture
def pauses(monkeypatch):
    """The pauses between tries, which take no time here."""
    found, now = [], [0.0]

    def sleep(seconds):
        found.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(attempts.time, "sleep", sleep)
    monkeypatch.setattr(attempts.time, "monotonic", lambda: now[0])
    return found


# ---------------------------------------------------------------- one call
class HttpError(Exception):  # gcsfs's, by its name
    def __init__(self, code, message=""):
        super().__init__(message)
        self.code = code


class ClientError(Exception):  # botocore's
    def __init__(self, code, status):
        super().__init__(f"An error occurred ({code})")
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


class Elsewhere(Exception):  # botocore's answer to HEAD, which has no words
    response = {
        "Error": {"Code": "400"},
        "ResponseMetadata": {
            "HTTPStatusCode": 400, "HTTPHeaders": {"x-amz-bucket-region": "eu-central-1"}
        },
    }  # fmt: skip


class ClientConnectorError(Exception):  # aiohttp's
    pass


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind", "may_pass"),
    [
        (FileNotFoundError("b/x"), "missing", False),
        (FileNotFoundError("The specified bucket does not exist"), "no bucket", False),
        (caused(FileNotFoundError("x"), ClientError("NoSuchBucket", 404)), "no bucket", False),
        (OSError("Forbidden: https://x\nno storage.objects.get"), "forbidden", False),
        (HttpError(401, "Anonymous caller"), "forbidden", False),
        (PermissionError("Access Denied"), "forbidden", False),
        (caused(OSError(errno.EIO, "x"), ClientError("PermanentRedirect", 301)), "region", False),
        (ClientError("AuthorizationHeaderMalformed", 400), "region", False),
        (caused(OSError(errno.EINVAL, "Bad Request"), Elsewhere()), "region", False),
        (RecursionError("maximum recursion depth exceeded"), "region", False),
        (ConnectionRefusedError(), "unreachable", True),
        (ClientConnectorError("Cannot connect to host"), "unreachable", True),
        (TimeoutError(), "unreachable", True),
        (HttpError(503, "backend"), "other", True),
        (HttpError(429, "rate"), "other", True),
        (FileExistsError("x"), "taken", False),
        (ValueError("x"), "other", False),
    ],
)
def test_faults_are_told_apart(error, kind, may_pass):
    fault = fault_of(error)
    assert (fault.kind, fault.may_pass) == (kind, may_pass)
    assert "\n" not in fault.reason


def test_the_other_region_is_named():
    assert "set AWS_DEFAULT_REGION to eu-central-1" in fault_of(Elsewhere()).fix


def test_a_bucket_that_is_not_there_is_told_from_an_object(url, monkeypatch):
    def missing(*arguments, **options):
        raise FileNotFoundError("bucket")

    bucket = Bucket(url)
    bucket.check_bucket()  # only gs:// does not say so by itself
    monkeypatch.setattr(type(filesystem("memory")), "pipe_file", missing)
    with pytest.raises(BucketError, match="there is no such bucket") as error:
        bucket.write("a", b"")
    assert error.value.kind == "no bucket"
    monkeypatch.setattr(type(filesystem("memory")), "call", missing, raising=False)
    bucket.url = bucket.url.replace("memory", "gs")
    with pytest.raises(BucketError, match="there is no such bucket"):
        bucket.check_bucket()


def test_no_credentials_are_named():
    error = type("NoCredentialsError", (Exception,), {})("Unable to locate credentials")
    assert fault_of(error).kind == "credentials"


def test_an_outage_is_waited_for_with_a_line_each_time(pauses, capsys):
    left = [ConnectionResetError("away")] * 4

    def call():
        if left:
            raise left.pop()
        return "there"

    assert attempt("gs://bucket/x", call) == "there"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(pauses) == 4
    assert all(line.startswith("gs://bucket/x: no connection") for line in lines)
    assert pauses[3] > 2 * pauses[0]


def test_an_outage_that_stays_is_an_error_after_minutes(pauses):
    def call():
        raise ConnectionRefusedError("away")

    with pytest.raises(BucketError, match="could not use gs://bucket/x: no connection"):
        attempt("gs://bucket/x", call)
    assert 200 < sum(pauses) <= attempts.SECONDS


def test_what_stays_wrong_is_not_tried_again(pauses):
    def call():
        raise PermissionError("Access Denied")

    with pytest.raises(BucketError, match="no right to it") as error:
        attempt("s3://bucket/x", call)
    assert error.value.kind == "forbidden"
    assert not pauses


# ---------------------------------------------------------------- objects
def test_objects_are_written_read_listed_and_removed(url):
    bucket = Bucket(f"{url}/")
    assert bucket.objects() == {} and bucket.entries() == [] and bucket.stat("a") is None
    bucket.write("a", b"0123456789")
    bucket.write("deep/er/b", b"b")
    Bucket(f"{url}2").write("other", b"")
    assert bucket.read("a") == b"0123456789"
    assert bucket.read_range("a", 2, 5) == b"234"
    assert bucket.checksum("a")[0] == 10
    assert list(bucket.objects()) == ["a", "deep/er/b"]
    assert bucket.entries() == ["a", "deep"]
    assert [about and about.size for about in map(bucket.stat, ("a", "deep"))] == [10, None]
    assert (bucket / "deep").read("er/b") == b"b"
    bucket.remove(["a", "absent"])
    assert list(bucket.objects()) == ["deep/er/b"]
    with pytest.raises(BucketError, match="there is no such object"):
        bucket.read("a")
    with pytest.raises(UserError, match="at most 0 bytes"):
        bucket.read("deep/er/b", most=0)
    assert Bucket(f"{url}2").read("other") == b""


def test_a_missing_package_and_an_unknown_store_are_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(UserError, match=r"needs the package s3fs, found none; pip install 'micro"):
        filesystem("s3")
    with pytest.raises(UserError, match="expected a URL of gs, s3, memory"):
        filesystem("nothing")


def test_checking_a_bucket_leaves_nothing_behind(url):
    check_writable(f"{url}/folder", folder=True)
    check_writable(f"{url}/file.png")
    assert Bucket(url).objects() == {}


# ---------------------------------------------------------------- outputs
def test_a_spool_sends_what_changed_and_removes_what_is_gone(url):
    bucket = Bucket(url)
    bucket.write("old", b"old")
    bucket.write("checkpoints/1/x", b"not fetched")
    sent = []
    upload = spool.Bucket.upload
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool.Bucket, "upload", lambda self, path, name: (
            sent.append(name), upload(self, path, name)))  # fmt: skip
        with output_folder(url, fetch=lambda name: name != "checkpoints") as output:
            assert (output.path / "old").read_text() == "old"
            assert not (output.path / "checkpoints").exists()
            assert output.path.name == "some" and with_urls(f"in {output.path}/a") == f"in {url}/a"
            (output.path / "new").write_text("1")
            (output.path / ".x.partial").write_text("")
            output.flush()
            assert sent == ["new"] and bucket.read("new") == b"1"
            (output.path / "new").write_text("12")
            (output.path / "old").unlink()
            local = output.path
        assert sent == ["new", "new"]
    assert set(bucket.objects()) == {"new", "checkpoints/1/x"}
    assert bucket.read("new") == b"12"
    assert not local.exists() and with_urls(str(local)) == str(local)


def test_a_spool_that_cannot_send_keeps_its_files_and_says_where(url, monkeypatch):
    def refuse(self, path, name):
        raise BucketError("could not use it", "forbidden")

    with pytest.raises(UserError, match=r"could not use it; the files lie in (\S+)") as error:
        with output_folder(url) as output:
            (output.path / "a").write_text("1")
            monkeypatch.setattr(spool.Bucket, "upload", refuse)
    folder = str(error.value).rpartition(" ")[2]
    assert os.listdir(folder) == ["a"]


def test_the_files_of_a_command_that_fails_are_sent_too(url):
    with pytest.raises(ZeroDivisionError):
        with output_folder(url) as output:
            (output.path / "a").write_text("1")
            raise ZeroDivisionError
    assert Bucket(url).read("a") == b"1"


def test_a_file_grows_and_is_sent_from_time_to_time(url, monkeypatch):
    monkeypatch.setattr(spool, "PUSH_SECONDS", 0.01)
    with output_folder(url) as output:
        (output.path / "a").write_text("1")
        while Bucket(url).stat("a") is None:
            attempts.time.sleep(0.01)


def test_a_single_file_is_sent_when_it_is_there(url, tmp_path):
    with output_file(f"{url}/x.json") as path:
        path.write_text("{}")
    assert Bucket(url).read("x.json") == b"{}"
    with output_file(tmp_path / "x") as path:
        assert path == tmp_path / "x"


def test_what_a_killed_process_left_is_removed(url, capsys):
    with output_folder(url) as output:
        home = output.path.parent.parent
        key = output.path.parent.name.partition("-")[0]
    (home / f"{key}-999999999").mkdir(parents=True)
    with output_folder(url):
        assert len(os.listdir(home)) == 1
    assert "left by a process that was killed" in capsys.readouterr().err


# ---------------------------------------------------------------- inputs
def test_a_file_is_fetched_once_and_again_when_it_changes(url, tmp_path, monkeypatch):
    Bucket(url).write("a.txt", b"1")
    first = fetched(f"{url}/a.txt")
    assert first.name == "a.txt" and first.read_text() == "1"
    assert with_urls(f"no {first}:") == f"no {url}/a.txt:"
    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "download", None)
        assert fetched(f"{url}/a.txt") == first
    Bucket(url).write("a.txt", b"23")
    assert fetched(f"{url}/a.txt").read_text() == "23"
    assert fetched(tmp_path) == tmp_path


def test_of_a_folder_the_chosen_files_are_fetched(url):
    for name in ("a", "b/c", "b/d"):
        Bucket(url).write(name, name.encode())
    folder = fetched(url, choose=lambda names: [name for name in names if name != "b/d"])
    assert folder.name == "some"
    assert sorted(path.name for path in folder.rglob("*")) == ["a", "b", "c"]
    assert (folder / "b" / "c").read_text() == "b/c"


def test_nothing_and_a_whole_bucket_are_refused(url):
    with pytest.raises(UserError, match=f"expected a file or folder at {url}/x, found none"):
        fetched(f"{url}/x")
    with pytest.raises(UserError, match="expected a file or folder in the bucket"):
        fetched("memory://bucket")
