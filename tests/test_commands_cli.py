"""Commands answer bad input with one line that names the fix, and exit status 2."""

import os
import pathlib
import subprocess
import sys

import pytest

from microdit_jax.commands import config_file
from microdit_jax.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent


def command(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True)


DEMO = "--config=configs/demo.py:pretrain"


@pytest.mark.slow
@pytest.mark.parametrize(
    "args, message",
    [
        (["train_main.py", DEMO, "--workdir=x", "--config.foo=1"], "unknown config key 'foo'"),
        (["train_main.py", "--config=configs/demo.py:x", "--workdir=x"], "has stages pretrain"),
        (["train_main.py", "--config=nope.py", "--workdir=x"], "--config must be a Python file"),
        (["train_main.py", DEMO], "--workdir must be given, found none; see"),
        (
            ["train_main.py", DEMO, "--workdir=x", "--heartbeat_timeout=nan"],
            "--heartbeat_timeout must be a finite number, found nan",
        ),
        (["train_main.py", DEMO, "--workdir=x", "--join_timeout=inf"], "--join_timeout must be a"),
        (["train_main.py", DEMO, "--workdir=x", "--join_timeout=-1"], "--join_timeout=-1: "),
        (["train_main.py", DEMO, "--workdir=x", "--bogus"], "Unknown command line flag 'bogus'"),
        (
            ["train_main.py", DEMO, "--workdir=x", "--config.train.mask_ratio=1.0"],
            "train.mask_ratio must be at least 0 and below 1, found 1.0",
        ),
        (["sample_main.py", "--model=nope", "--prompt=a"], "found nothing at nope"),
        (["sample_main.py", "--model=pyproject.toml", "--prompt=a"], "pyproject.toml"),
        (["sample_main.py"], "expected a prompt, found an empty one"),
        (["sample_main.py", "apple"], "unexpected arguments ['apple']; a prompt"),
        (
            ["train_main.py", "--config=configs/demo.py", "--workdir=x", "--config.train.steps=1"],
            "a chain of stages; give --config.STAGE.train, with STAGE one of pretrain, f",
        ),
    ],
)
def test_bad_input(args, message):
    result = command(*args)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert not (ROOT / "x").exists()


def test_help_shows_an_example():
    result = command("sample_main.py", "--help")
    assert "python sample_main.py --model=" in result.stdout and result.returncode == 0


def test_a_configuration_that_ends_the_process_is_no_success(tmp_path):
    (tmp_path / "ends.py").write_text("raise SystemExit(3)\n")
    assert command("train_main.py", f"--config={tmp_path}/ends.py", "--workdir=x").returncode == 3


def test_configs_of_an_installed_package(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert config_file.installed("configs/demo.py") == f"{ROOT}/configs/demo.py"
    assert config_file.installed("configs/nope.py") == "configs/nope.py"
    assert "stages" in config_file.read_config("configs/demo.py")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.py").touch()  # one's own comes first
    assert config_file.installed("configs/demo.py") == "configs/demo.py"


@pytest.mark.parametrize(
    "text, words",
    [
        ("# MicroDiT\n\nIt's a network.\n", ", line 3: unterminated string literal"),
        ("", "found none in .*config.py; define it there"),
        ("import nothing_of_that_name\n", "line 1: ModuleNotFoundError: No module named 'nothing"),
        ("def get_config():\n    x = 1\n    return x / 0\n", "line 3: ZeroDivisionError: division"),
        (
            "def get_config():\n    return {}\n",
            "ConfigDict, found dict from .*; return one",
        ),
        ("def get_config():\n    pass\n", "ConfigDict, found NoneType"),
        ("def get_config(a, b):\n    pass\n", "config.py: TypeError: get_config.. missing 2"),
        ("open('nowhere')\n", "line 1: FileNotFoundError: .*nowhere"),
        ("\0", "source code string cannot contain null bytes"),
        ("(" * 100_000, "config.py.*; correct the file"),
    ],
)
def test_a_config_file_that_cannot_be_used(tmp_path, text, words):
    (tmp_path / "config.py").write_text(text)
    with pytest.raises(UserError, match=f"^--config must be .*{words}"):
        config_file.read_config(str(tmp_path / "config.py"))
    assert [path.name for path in tmp_path.iterdir()] == ["config.py"]  # no __pycache__


@pytest.mark.parametrize("path", ["nowhere.py", ".", "", "/dev/zero", "configs/demo.py/x"])
def test_a_config_file_that_is_none(path):
    with pytest.raises(UserError, match="^--config must be a Python file with get_config, such as"):
        config_file.read_config(path)


def test_locks_left_behind_are_not_told(tmp_path):
    # What a progress bar does on Python 3.14, before a command fails.
    (tmp_path / "failing.py").write_text(
        "def main(arguments):\n"
        "    import multiprocessing\n"
        "    main.lock = multiprocessing.get_context('spawn').Lock()\n"
        "    raise OSError(28, 'No space left on device')\n"
    )
    program = "from microdit_jax.commands.boundary import run_command; run_command('failing.py')"
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert ended.stderr == "error: No space left on device; check that path, or give another\n"
