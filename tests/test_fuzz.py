"""The committed corpora and mutations of them, in processes that may not crash; and their watch."""

import subprocess
import sys

import pytest
from conftest import ROOT
from support.hostile import run_hostile

from fuzz.run import CORPORA
from fuzz.seeds.__main__ import MAKERS, write
from fuzz.targets import MODULES

MUTATIONS = 300  # of each corpus; `make fuzz` goes on for minutes or hours


def test_every_target_has_a_corpus(tmp_path):
    """Compressed bytes differ between versions of zlib, so names alone are compared."""
    assert set(MAKERS) == set(MODULES)
    write(tmp_path)
    for name in MODULES:
        made = {file.name for file in (tmp_path / name).iterdir()}
        there = {file.name for file in (CORPORA / name).iterdir()}
        assert made == {file for file in there if not file.startswith("found")}, name
    sizes = [file.stat().st_size for file in CORPORA.rglob("*") if file.is_file()]
    assert len(sizes) > 200 and sum(sizes) < 1_000_000


@pytest.mark.parametrize("module", sorted(set(MODULES.values())))
def test_no_file_does_more_than_be_refused(module, tmp_path):
    """In 4 GB of address space and 30 s, all targets of one module."""
    names = [name for name, where in MODULES.items() if where == module]
    command = ["-m", "fuzz.replay", f"--mutations={MUTATIONS}", *names]
    done = run_hostile(command, tmp_path, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == names


# Runs a target whose reader is `body`; its corpus is that of "zip".
READER = """
import os, sys, time
import numpy as np
import fuzz.run
from fuzz.targets import Target
calls = []
def read(data):
    calls.append(data)
    if len(calls) > 30:
        {body}
fuzz.run.target = lambda name: Target(lambda scratch: read, (ValueError,))
fuzz.run.HANG_SECONDS = 4
fuzz.run.GROWTH_BYTES = 30 << 20
runner = fuzz.run.Runner("zip")
for _ in range(40):
    runner.execute(b"")
print("well")
"""


@pytest.mark.parametrize(
    "body, told",
    [
        ("raise ValueError('documented')", "well"),
        ("raise KeyError('undocumented')", "KeyError: 'undocumented'"),
        ("os.abort()", ""),
        ("import subprocess; subprocess.run(['true'])", "Escape: "),
        ("os.system('true')", "Escape: os.system"),
        ("import antigravity", "Escape: import ('antigravity'"),
        ("open('escaped', 'w')", "Escape: open"),
        ("open('/dev/null')", "well"),
        ("import socket; socket.socket()", "Escape: "),
        ("os.chdir('/')", "Escape: globals changed"),
        ("sys.setrecursionlimit(5000)", "Escape: globals changed"),
        ("import ml_dtypes; np.dtype(ml_dtypes.bfloat16).__setstate__("
         "(3, '<', None, None, None, 64, 1, 64))", "Escape: globals changed"),
        ("from microdit_jax.errors import UserError; e = UserError(''); e.args = ('\\x1b[2J',); "
         "raise e", "a terminal would act upon"),
        ("calls.append(bytearray(b'x' * (60 << 20)))", "Escape: took more than"),
        ("time.sleep(30)", "Timeout"),
    ],
)  # fmt: skip
def test_the_watch(body, told, tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "ignore", "-c", READER.format(body=body)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode == 0) == (told == "well"), done.stderr
    assert told in done.stdout + done.stderr
    assert not (tmp_path / "escaped").exists()
