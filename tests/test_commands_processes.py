"""The commands' boundary in processes of their own: signals, streams, terminals, start and help."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from test_commands_flags import COMMANDS

# Undoes what nohup or a shell's `&` did to pytest, whose children inherit it.
DEFAULT_SIGNALS = "--default-signal=INT,HUP,TERM"


def start(*command: str, signals: str = DEFAULT_SIGNALS, **options) -> subprocess.Popen:
    defaults = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    return subprocess.Popen(["env", signals, sys.executable, *command], **defaults | options)


SCRIPT = """
import os, sys, time
from microdit_jax.commands import boundary
def main(arguments):
    {body}
boundary.run_command("__main__")
"""


def script(body: str, *arguments: str, **options) -> subprocess.Popen:
    """A command whose work is `body`."""
    return start(
        "-c", SCRIPT.format(body=body.strip().replace("\n", "\n    ")), *arguments, **options
    )


# As XLA compiles: for minutes without Python's lock, deaf to its signal handlers.
IN_C = """
import hashlib
print("at work", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""
SWALLOWED = """
class Held:
    def __del__(self):
        print("at work", flush=True)
        while True:
            time.sleep(0.01)
Held()
print("went on")
"""
CAUGHT = """
print("at work", flush=True)
for _ in range(1000):
    try:
        time.sleep(1)
    except BaseException:
        pass
"""
POLITE = """
try:
    print("at work", flush=True)
    time.sleep(60)
finally:
    print("cleaned up", flush=True)
"""


@pytest.mark.parametrize(
    "name, body, status, most",
    [
        ("SIGINT", POLITE, 130, 1.0),
        ("SIGTERM", POLITE, 143, 1.0),
        ("SIGHUP", POLITE, 129, 1.0),
        ("SIGINT", SWALLOWED, 130, 2.0),
        ("SIGTERM", CAUGHT, 143, 2.0),
        ("SIGINT", IN_C, 130, 2.0),
        ("SIGHUP", IN_C, 129, 2.0),
    ],
)  # fmt: skip
def test_signals_end_a_command_soon(name, body, status, most):
    process = script(body)
    assert process.stdout.readline() == "at work\n"
    began = time.monotonic()
    process.send_signal(getattr(signal, name))
    out, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (status, "stopped; the same command goes on\n")
    assert out == ("cleaned up\n" if body is POLITE else "")
    assert time.monotonic() - began < most + 1.0  # of a busy machine


def test_a_swallowed_signal_ends_the_process_at_once():
    """Python ignores exceptions of callbacks and destructors; this one it must not."""
    process = script(SWALLOWED)
    assert process.stdout.readline() == "at work\n"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=30)
    assert (process.returncode, out, error) == (130, "", "stopped; the same command goes on\n")
    assert time.monotonic() - began < 1.2  # not by the thread that watches


@pytest.mark.parametrize("ending", ["time.sleep(60)", IN_C.strip()])
def test_the_line_stands_below_a_progress_bar(ending):
    process = script(f"print('50 %', end='', file=sys.stderr, flush=True)\n{ending}")
    assert process.stderr.read(4) == "50 %"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "\nstopped; the same command goes on\n"


def test_ignored_signals_stay_ignored():
    process = script(
        "import signal\nos.kill(os.getpid(), signal.SIGHUP); print(boundary.program())",
        signals="--ignore-signal=HUP",
    )
    assert process.communicate(timeout=30) == ("-c\n", "")


def test_a_child_process_has_its_own_signals():
    process = script(
        "import signal\npid = os.fork()\nif not pid:\n    time.sleep(60)\n"
        "time.sleep(0.5); os.kill(pid, signal.SIGTERM); print(os.waitpid(pid, 0)[1]); time.sleep(2)"
    )  # fmt: skip
    assert process.communicate(timeout=30) == (f"{int(signal.SIGTERM)}\n", "")


@pytest.mark.parametrize("delay", [0.2, 0.6])
def test_ctrl_c_while_modules_are_imported(delay):
    process = start("sample_main.py", "--prompt=a", "--num_images=0")
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    if process.returncode == 2:  # a quick machine: over already
        return
    # Before the boundary's first line, in Python's own start, it is Python's, or the end at once.
    if "boundary" not in error and process.returncode in (1, -signal.SIGINT):
        return
    assert (process.returncode, error) == (130, "stopped; the same command goes on\n")


def test_the_boundary_stands_before_large_modules_are_imported():
    code = "import sys, microdit_jax.commands.boundary; print(sorted({*sys.modules} & LARGE))"
    code = code.replace("LARGE", "{'numpy', 'jax', 'absl', 'fsspec', 'orbax'}")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


LINES = "for i in range(100_000): print('line', i)\nprint('done', file=sys.stderr)"


def test_a_reader_that_goes_away_ends_nothing():
    with script(LINES) as process:
        assert process.stdout.readline() == "line 0\n"
        process.stdout.close()
        assert process.stderr.read() == "done\n" and process.wait(timeout=30) == 0


def test_output_that_cannot_be_written():
    with open("/dev/full", "w") as full:
        process = script(LINES, stdout=full)
        assert process.communicate(timeout=30)[1] == (
            "done\nerror: the output was lost: No space left on device; send it elsewhere\n"
        )
        assert process.returncode == 2
        process = script("print('a'); print('b', file=sys.stderr); print('c')", stderr=full)
        assert process.communicate(timeout=30)[0] == "a\nc\n" and process.returncode == 0


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed, tmp_path):
    """No file that the command opens may take the number of a closed stream."""
    program = SCRIPT.format(
        body="file = open(sys.argv[1], 'w'); print('a'); print('b', file=sys.stderr)\n"
        "    os.write(1, b'c'); os.write(2, b'd'); file.write('whole')"
    )
    line = f'"$0" -c "$1" "$2" {closed}'
    done = subprocess.run(["sh", "-c", line, sys.executable, program, str(tmp_path / "file")])
    assert done.returncode == 0 and (tmp_path / "file").read_text() == "whole"


@pytest.mark.parametrize(
    "variables", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}, {"PYTHONIOENCODING": "latin-1"}]
)
def test_a_terminal_that_cannot_show_it(variables):
    process = script(
        "print(arguments[0], 'красный \\udce8'); print(arguments[0], file=sys.stderr)",
        "crème brûlée", env=os.environ | variables, text=False,
    )  # fmt: skip
    out, error = process.communicate(timeout=30)
    assert process.returncode == 0 and b"Traceback" not in error
    assert out.startswith((b"cr\\xe8me", "crème".encode(), "crème".encode("latin-1")))


@pytest.mark.slow
def test_jax_that_cannot_start(tmp_path):
    process = start(
        "sample_main.py", "--prompt=a", f"--out={tmp_path}",
        env=os.environ | {"JAX_PLATFORMS": "nonsense"},
    )  # fmt: skip
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2 and error.count("\n") == 1, error
    assert error.startswith("error: JAX cannot start with JAX_PLATFORMS=nonsense: ")
    assert "pip install 'microdit_jax[cuda12]'" in error


@pytest.mark.slow
def test_files_of_generic_names_break_no_command(tmp_path):
    for name in ("convert", "configs", "models", "train_main", "sample_main", "commands"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError('not to be imported')\n")
    commands = [name.removeprefix("python -m ") for name in COMMANDS.values()]
    processes = [
        start("-m", name, "--help", cwd=tmp_path)
        for name in commands
        if name.startswith("microdit_jax")
    ] + [
        start(
            "-c",
            f"from microdit_jax.commands.scripts import {name} as f; f()",
            "--help",
            cwd=tmp_path,
        )
        for name in ("train", "sample", "convert")
    ]
    for process in processes:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0 and not error, error
        assert re.search(r"(?i)example|^  python -m", out, re.M), out


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--help", "--helpshort", "--helpfull", "-?"])
def test_help_is_a_success(flag):
    process = start("train_main.py", flag)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0 and not error
    assert out.startswith("Trains MicroDiT") and "--workdir: " in out
    assert ("--verbosity" in out) == (flag == "--helpfull")


def test_a_closed_loop_of_orbax_is_no_line():
    """Raised in callbacks of writes that a failed save no longer waits for."""
    process = script("""
class Held:
    def __del__(self):
        raise RuntimeError(arguments[0])
Held()
""", "Event loop is closed")  # fmt: skip
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (0, "")
