"""Files and folders are written whole or not at all, and failures are one line."""

import json
import os

import pytest

from microdit_jax import files
from microdit_jax.errors import UserError, visible


def fail(*arguments, **options):
    raise OSError(28, "No space left on device")


WRITES = {
    "bytes": lambda path: files.write_bytes(path, b"new"),
    "bytes, others' first": lambda path: files.write_bytes(path, b"new", replace=False),
    "text": lambda path: files.write_text(path, "new"),
    "json": lambda path: files.write_json(path, {"new": 1}),
}


@pytest.mark.parametrize("name", ["bytes", "text", "json"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, name):
    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(UserError, match="could not write .*file: No space left.*; free some space"):
        WRITES[name](path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", WRITES)
def test_a_kill_at_the_last_moment_leaves_the_old_file(tmp_path, monkeypatch, name):
    """Nothing of the new contents stands under the file's name before all of them do."""
    path, seen = tmp_path / "file", []
    path.write_text("old")
    real = os.replace, os.link

    def watch(call):
        def watched(source, target, **options):
            seen.append((path.read_text(), len(os.listdir(tmp_path))))
            return call(source, target, **options)

        return watched

    monkeypatch.setattr("os.replace", watch(real[0]))
    monkeypatch.setattr("os.link", watch(real[1]))
    WRITES[name](path)
    assert seen == [("old", 2)] and os.listdir(tmp_path) == ["file"]


def test_a_file_that_is_there_may_stay(tmp_path):
    path = tmp_path / "a" / "file"
    files.write_bytes(path, b"first", replace=False)
    files.write_bytes(path, b"second", replace=False)
    assert path.read_bytes() == b"first" and os.listdir(path.parent) == ["file"]
    files.write_bytes(path, b"third")
    assert path.read_bytes() == b"third"


def test_a_folder_takes_its_name_when_it_is_whole(tmp_path):
    folder = tmp_path / "folder"
    (tmp_path / ".folder.partial" / "left_by_a_kill").mkdir(parents=True)
    with pytest.raises(ZeroDivisionError), files.atomic_folder(folder) as partial:
        assert not list(partial.iterdir())
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with files.atomic_folder(folder) as partial:
        (partial / "one").write_text("1")
        assert not folder.exists()
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(folder) == ["one"]


@pytest.mark.parametrize("keep, left", [(True, "first"), (False, "second")])
def test_of_a_folder_written_by_two_at_once_one_stays(tmp_path, keep, left):
    folder = tmp_path / "folder"
    with files.atomic_folder(folder, keep=lambda: keep) as second:
        with files.atomic_folder(folder, keep=lambda: False) as first:
            (first / "first").touch()
        (second / "second").touch()
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(folder) == [left]


def test_too_little_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match="found 0.00 GB free"):
        files.write_bytes(tmp_path / "file", b"eleven bytes")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["[1]", "{", "\udcff", ""])
def test_damaged_json_is_one_line(tmp_path, text):
    path = tmp_path / "file.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match="expected .*JSON.* in .*file.json, found"):
        files.read_json(path)


def test_json_goes_there_and_back(tmp_path):
    contents = {"caption": "crème brûlée", "sizes": [1, 2.5, None]}
    files.write_json(tmp_path / "file.json", contents)
    assert files.read_json(tmp_path / "file.json") == contents
    assert json.loads((tmp_path / "file.json").read_text(encoding="utf-8")) == contents


def test_checksums_name_what_changed(tmp_path):
    for name in ("kept", "changed", "longer", "gone"):
        (tmp_path / name).write_text(name)
    sums = files.checksums(tmp_path)
    assert not files.damage(tmp_path, sums)
    (tmp_path / "changed").write_text("CHANGED")
    (tmp_path / "longer").write_text("longer than it was")
    (tmp_path / "gone").unlink()
    assert sorted(files.damage(tmp_path, sums)) == [
        "changed (contents changed)",
        "gone (missing)",
        "longer (18 bytes instead of 6)",
    ]


def test_places_are_tried_before_the_work(tmp_path):
    file, loop, nowhere = tmp_path / "file", tmp_path / "loop", tmp_path / "nowhere"
    file.write_text("old")
    loop.symlink_to(loop)
    nowhere.symlink_to(tmp_path / "missing")
    (tmp_path / "link").symlink_to(file)
    here = sorted(os.listdir(tmp_path))
    for path, folder in [
        (file, False), (tmp_path / "link", False), (nowhere, False),
        (tmp_path / "new", False), (tmp_path / "a" / "b" / "new", False),
        (tmp_path, True), (tmp_path / "a" / "b", True),
    ]:  # fmt: skip
        files.check_writable(path, folder=folder)
    for path, folder, reason in [
        (tmp_path, False, "Is a directory"),
        (file, True, "Not a directory"),
        (file / "below", True, "Not a directory"),
        (file / "below", False, "Not a directory"),
        (loop / "new", True, "Too many levels of symbolic links"),
        (loop, True, "Too many levels of symbolic links"),
        (nowhere / "new", False, "No such file or directory"),
        ("/proc/new", True, "No such file or directory"),
        (loop, False, "Too many levels of symbolic links"),
        (tmp_path / ("x" * 300), True, "File name too long"),
    ]:
        with pytest.raises(UserError, match=f"could not write .*{reason}"):
            files.check_writable(path, folder=folder)
    assert sorted(os.listdir(tmp_path)) == here and file.read_text() == "old"


# ---------------------------------------------------- files that anybody may have made
def test_pipes_devices_and_folders_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(UserError, match="a pipe or device"):
            files.read_bytes(path)
    with pytest.raises(IsADirectoryError):
        files.read_bytes(tmp_path)


def test_reads_are_bounded(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert files.read_bytes(tmp_path / "a", 5) == b"12345"
    with pytest.raises(UserError, match=r"at most 4 bytes in .*a, found more"):
        files.read_bytes(tmp_path / "a", 4)


@pytest.mark.parametrize(
    "name", ["../a", "/etc/passwd", "x/../../a", "link/a", "out", "", ".", "\0"]
)
def test_no_name_leads_out_of_its_folder(tmp_path, name):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    (root / "out").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="expected .* file .*root"):
        files.inside(root, name)


def test_names_and_links_that_stay_inside_are_taken(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "link").symlink_to("b")
    assert files.inside(tmp_path, "link/c") == tmp_path / "link" / "c"
    assert files.inside(tmp_path, "b/../d") == tmp_path / "b/../d"


@pytest.mark.parametrize(
    "text", ["[" * 200_000, b"\xff", r'"\ud800"', r'{"\udfff": 1}', "1" * 9999]
)
def test_json_that_breaks_a_parser_is_a_value_error(text):
    with pytest.raises(ValueError):
        files.parse_json(text)


def test_json_of_any_language_is_read():
    assert files.parse_json(rb'["\ud83d\ude00", "caf\u00e9"]') == ["\U0001f600", "caf\u00e9"]


def test_texts_of_unknown_origin_have_no_hidden_effect():
    hostile = "a\x1b[31m\r\n\u202eb\ud800\u2028\x9b"
    assert visible(hostile) == r"a\x1b[31m\r\n\u202eb\ud800\u2028\x9b"
    assert visible("cr\u00e8me\u00a0br\u00fbl\u00e9e \U0001f468\u200d\U0001f469") == (
        "cr\u00e8me\u00a0br\u00fbl\u00e9e \U0001f468\u200d\U0001f469"
    )
    assert visible("x" * 600) == "x" * 500 + "... (600 characters)"


def test_a_secret_is_one_from_its_first_moment(tmp_path):
    with files.atomic_file(tmp_path / "secret", mode=0o600):
        (partial,) = tmp_path.iterdir()
        assert partial.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
