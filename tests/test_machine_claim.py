import json
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest

from microdit_jax.errors import UserError
from microdit_jax.files.lock import NAME
from microdit_jax.machine import claim
from microdit_jax.machine.claim import Claim, check_shared


def leave(folder, **changes) -> None:
    """A claim as another process has left it."""
    with Claim(folder):
        about = json.loads((folder / NAME).read_text())
    (folder / NAME).write_text(json.dumps(about | changes))


def test_one_job_at_a_time(tmp_path, monkeypatch):
    """The second is refused while the first gives signs of life."""
    monkeypatch.setattr(claim, "BEAT_SECONDS", 0.5)
    program = (
        "import sys, time, pathlib; from microdit_jax.machine import claim\n"
        "claim.BEAT_SECONDS = 0.5\n"
        "with claim.Claim(pathlib.Path(sys.argv[1])): print('at work', flush=True); time.sleep(60)"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout.readline() == "at work\n"
        with pytest.raises(UserError, match=rf"another at work there: process {first.pid} on "):
            Claim(tmp_path)
    finally:
        first.kill()
        first.communicate()
    with Claim(tmp_path):  # of a process that is gone from this host: at once
        assert (tmp_path / NAME).is_file()
    assert list(tmp_path.iterdir()) == []


def test_a_stale_claim_of_another_host_is_taken_over(tmp_path, capfd):
    leave(tmp_path, host="other", token="theirs")
    os.utime(tmp_path / NAME, (time.time() - 58, time.time() - 58))
    began = time.monotonic()
    with Claim(tmp_path) as mine:
        assert 1.0 < time.monotonic() - began < 20
        mine.check(now=True)
        assert re.search(
            r"process \d+ on other gave its last sign of life 5\d s ago", capfd.readouterr().err
        )
        (tmp_path / NAME).write_text(json.dumps({"pid": 7, "host": "third", "token": "its"}))
        with pytest.raises(UserError, match="found it taken over by process 7 on third"):
            mine.check(now=True)
    assert json.loads((tmp_path / NAME).read_text())["token"] == "its"  # not ours to remove


def test_a_workdir_that_is_moved_is_noticed_and_not_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "BEAT_SECONDS", 0.1)
    with Claim(tmp_path / "run") as mine:
        mine.check()
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        time.sleep(1.0)
        with pytest.raises(UserError, match="its .lock gone: the folder was moved, unmounted"):
            mine.check()
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_a_disk_that_is_not_shared(tmp_path, monkeypatch):
    with Claim(tmp_path) as mine:
        check_shared(tmp_path, mine.token)
        other = pathlib.Path(tmp_path, "other")
        for there in (lambda: None, other.mkdir, lambda: leave(other)):
            there()
            with pytest.raises(UserError, match="another folder here than on process 0; mount"):
                check_shared(other, mine.token)
            monkeypatch.setattr(claim.time, "sleep", lambda seconds: None)
            monkeypatch.setattr(claim.time, "monotonic", iter(range(0, 1000, 10)).__next__)
