"""Whatever a command is given, it ends with one line and a status that says what happened."""

import contextlib
import importlib
import io
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from absl import flags
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_commands_flags import COMMANDS, flags_of

from microdit_jax.commands import boundary, cli
from microdit_jax.errors import UserError

# What makes the rest of the arguments matter.
BASE = {
    "train_main": ["--config=configs/demo.py:pretrain", "--workdir=out"],
    "sample_main": ["--prompt=a red apple"],
    "microdit_jax.evaluate.__main__": ["--model=instant"],
    "microdit_jax.prepare.__main__": ["--source=folder", "--input=.", "--output=out"],
    "microdit_jax.prepare.reformat": ["--input=.", "--output=out", "--to=mds"],
    "microdit_jax.convert.__main__": ["--input=cut.pt", "--output=out"],
    "convert.parity": ["--input=cut.pt", "--activations=cut.npz"],
    "microdit_jax.xla.aot.__main__": ["--config=configs/demo.py:pretrain", "--topology=cpu:8"],
    "microdit_jax.xla.plot": ["--reports=cut.json"],
    "microdit_jax.training.report": ["--runs=."],
    "microdit_jax.commands.environment": ["cpu"],
}
PATHS = (
    "input", "output", "config", "workdir", "prompts", "again", "out", "captions", "activations",
    "record", "json", "report", "reports", "runs", "dump", "geneval_prompts", "reference",
)  # fmt: skip
CASES = 155  # of each of the 13 commands: 2,000 in all
# The flags of a command that its own work begins after, and where that is cut off.
WORK = {
    "train_main": ["microdit_jax.train.train", "microdit_jax.train.train_stages"],
    "sample_main": ["microdit_jax.create.load"],
    "microdit_jax.evaluate.__main__": ["microdit_jax.create.load"],
    "microdit_jax.app.__main__": ["microdit_jax.create.load"],
    "microdit_jax.prepare.__main__": ["microdit_jax.assets.load.load_codec"],
    "microdit_jax.xla.aot.__main__": [
        "microdit_jax.xla.topologies.get",  # after it has read the name
    ],
    "microdit_jax.xla.bench.__main__": [
        "microdit_jax.xla.bench.rows.measure", "microdit_jax.xla.bench.loader.measure_all",
    ],
}  # fmt: skip


def begin(*arguments, **options):
    raise SystemExit(0)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Paths of all kinds, by what is wrong with them."""
    folder = tmp_path_factory.mktemp("places")
    good = """import ml_collections
def get_config(x=''):
    return ml_collections.ConfigDict({'a': 1, 'b': 'c', 'd': (1, 2)})
"""
    contents = {
        "empty": b"", "null": b"\0" * 100, "latin": "crème brûlée".encode("latin-1"),
        "text.txt": "красный перец\n\n a \n".encode(), "rows.csv": b"a,b\n1\n",
        "list.json": b"[1, 2]", "cut.json": b'{"a": ', "deep.json": b"[" * 100_000,
        "object.json": b'{"dit": {}, "kind": 7, "chip": {}}',
        "zip.pt": b"PK\x03\x04 cut", "pickle.pt": b"\x80\x02cos\nsystem\n.",
        "x.safetensors": b"\x08", "big.safetensors": b"\xff" * 16,
        "cut.png": b"\x89PNG\r\n\x1a\n", "cut.npz": b"PK",
        "dict.py": b"def get_config(x=''):\n    return {}\n", "bad.py": b"x = (\n",
        "good.py": good.encode(),
    }  # fmt: skip
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    (folder / "folder").mkdir()
    (folder / "folder" / "config.json").write_text("{}")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "nowhere").symlink_to(folder / "missing")
    names = [str(folder / name) for name in os.listdir(folder)]
    return [*names, str(folder / "missing" / "below"), str(folder / "empty" / "below"), "/proc/1/x",
            str(folder), ".", "/dev/null", "x" * 300]  # fmt: skip


@contextlib.contextmanager
def command(name: str):
    """A command's `main` with absl's flags of its own: several commands have some of the same."""
    fresh = flags.FlagValues()
    for module, theirs in flags.FLAGS.flags_by_module_dict().items():
        for flag in theirs if module.startswith("absl") else ():
            fresh[flag.name] = flag
            fresh.register_flag_by_module(module, flag)
    before, loaded = dict(flags.FLAGS.__dict__), {}
    for module in (name, "microdit_jax.model_flags"):
        loaded[module] = sys.modules.pop(module, None)
    package = sys.modules["microdit_jax"]
    held = package.__dict__.pop("model_flags", None)
    flags.FLAGS.__dict__.clear()
    flags.FLAGS.__dict__.update(fresh.__dict__)
    try:
        yield importlib.import_module(name).main
    finally:
        flags.FLAGS.__dict__.clear()
        flags.FLAGS.__dict__.update(before)
        for module, old in loaded.items():
            sys.modules.pop(module, None)
            if old is not None:
                sys.modules[module] = old
        if held is not None:
            package.model_flags = held


def run(main, arguments: list[str]) -> tuple[int, str]:
    """Exit status and stderr of a command within the boundary, in this process."""
    for flag in list(flags.FLAGS):  # what the case before gave
        flags.FLAGS[flag].unparse()
        if flag.startswith("config."):  # defined as it was read
            delattr(flags.FLAGS, flag)
    error = io.TextIOWrapper(io.BytesIO(), "ascii", errors="backslashreplace")
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        status = boundary.outcome(lambda: main(arguments), arguments)
    error.flush()
    return status, error.buffer.getvalue().decode()


words = st.one_of(
    st.integers(-(10**12), 10**12).map(str),
    st.floats().map(str),
    st.text(st.characters(exclude_characters="/\0", exclude_categories=()), max_size=12),
    st.sampled_from([
        "", "-1", "0", "1e400", "nan", "inf", "9" * 5000, "True", "none", "a,b", "1,,2", "h100:8",
        "cpu:1000000000", "v5e:3x3", "gs://a/b", "s3://", "twemoji", "emoji", "folder", "mds",
        "t5", "torch", "(" * 200, "{'a': 1}", "fid,clip_score", "train", "::", "localhost:1", "%s",
        "configs/demo.py", "configs/demo.py:pretrain", "configs/recipe.py:x", "crème brûlée",
    ]),
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_no_argument_leads_to_a_traceback(name, places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("microdit_jax.machine.hosts.preflight", begin)
    monkeypatch.setattr(cli, "use_compilation_cache", lambda: None)
    monkeypatch.setattr("microdit_jax.xla.topologies.prepare", lambda name: None)
    monkeypatch.setattr("microdit_jax.app.__main__.listen", begin, raising=False)
    for target in WORK.get(name, ()):
        monkeypatch.setattr(target, begin)
    known = sorted(flags_of(name))
    if "config" in known and "workdir" in known or "topology" in known:
        known += ["config.nothing", "config.train.nothing", "config.model.options.nothing"]
    value = words | st.sampled_from(places)
    paths = [flag for flag in PATHS if flag in known] or ["help"]
    usual = st.sampled_from(["1", "2", "8", "0.5", "256", "1,2", "-3", "float32", "clean", "jax"])
    # Most arguments must be such that what comes after their parsing is reached.
    argument = st.one_of(
        st.builds("--{}={}".format, st.sampled_from(paths), st.sampled_from(places)),
        st.builds("--{}={}".format, st.sampled_from(paths), st.sampled_from(places)),
        st.builds("--{}={}".format, st.sampled_from(known), usual),
        st.builds("--{}={}".format, st.sampled_from(known), usual),
        st.builds("--{}={}".format, st.sampled_from(known), value),
        st.builds("--{}".format, st.sampled_from([*known, "", "nothing"])) | value,
    )
    environment = st.dictionaries(
        st.sampled_from(["SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST",
                         "XDG_CACHE_HOME", "OMPI_MCA_orte_hnp_uri"]),
        st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=8), max_size=2,
    )  # fmt: skip

    with command(name) as main:

        @settings(
            max_examples=CASES, derandomize=True, deadline=None, database=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(st.lists(argument, max_size=3), environment)
        def check(more, variables):
            arguments = [*BASE.get(name, []), *more]
            with monkeypatch.context() as patch:
                for variable, text in variables.items():
                    patch.setenv(variable, text)
                status, error = run(main, arguments)
            assert status in (0, 2), error
            assert "Traceback" not in error
            if status:
                lines = [line for line in error.splitlines() if not line.startswith("warning: ")]
                assert len(lines) == 1 and lines[0].startswith("error: "), error

        check()


# ------------------------------------------------------------------ what ends a command
ENDINGS = [
    (None, 0, ""),
    (UserError("expected a, found b"), 2, "error: expected a, found b"),
    (SystemExit(3), 3, ""),
    (SystemExit("words"), 1, "words"),
    (KeyboardInterrupt(), 130, "stopped; the same command goes on"),
    (MemoryError("of an array"), 2, "error: out of memory: MemoryError: of an array; ask for less"),
    (RuntimeError("RESOURCE_EXHAUSTED: of 3 GB\nmore"), 2, "error: out of memory of the device: "),
    (OSError(40, "Too many levels", "a\nb"), 2, "error: a b: Too many levels; check that path"),
    (PermissionError(13, "Permission denied", "a", None, "c"), 2, "error: a -> c: Permission den"),
    (ModuleNotFoundError("No module named 'x'", name="x"), 2, "error: ModuleNotFoundError: No mod"),
]


@pytest.mark.parametrize("error, status, line", ENDINGS)
def test_a_command_ends_with_one_line(error, status, line, capsys):
    def work():
        if error is not None:
            raise error

    assert boundary.outcome(work) == status
    told = capsys.readouterr().err
    assert told.startswith(line) and told.count("\n") == bool(line), told


@pytest.mark.parametrize("home", [True, False])
def test_a_defect_leaves_its_traceback(home, tmp_path, monkeypatch, capsys):
    cache = tmp_path / "cache" if home else "/proc/nowhere"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert boundary.outcome(lambda: {}["key"]) == 1
    told = capsys.readouterr().err
    (file,) = (cache / "microdit_jax" / "defects" if home else tmp_path).iterdir()
    assert told == (
        f"this is a defect of microdit_jax: KeyError: 'key'; its traceback is in {file}; report "
        "it with that file and the command\n"
    )
    assert "Traceback" in file.read_text() and 'lambda: {}["key"]' in file.read_text()


def test_text_that_no_terminal_should_get(capsys):
    def work():
        raise UserError("found \x1b[2J, \udce8 and \u2603\nbelow")

    assert boundary.outcome(work) == 2
    assert capsys.readouterr().err == "error: found \\x1b[2J, \\udce8 and \u2603 below\n"
    assert boundary.outcome(work, ["--prompt=cr\udce8me"]) == 2
    assert "expected arguments in UTF-8, found '--prompt=cr\\udce8me'" in capsys.readouterr().err


def test_a_folder_that_is_gone(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert boundary.outcome(lambda: None) == 2
    assert "error: the current folder is gone" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------ processes
def default_signals() -> None:
    """Undoes what nohup or a shell's `&` did to pytest, whose children inherit it."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def start(*command: str, **options) -> subprocess.Popen:
    defaults = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    defaults["preexec_fn"] = default_signals
    return subprocess.Popen([sys.executable, *command], **defaults | options)


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
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
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
    # Before the boundary's first line, in Python's own start, it is Python's.
    if "boundary" not in error and "site" in error:
        return
    assert (process.returncode, error) == (130, "stopped; the same command goes on\n")


LINES = "for i in range(100_000): print('line', i)\nprint('done', file=sys.stderr)"


def test_a_reader_that_goes_away_ends_nothing():
    process = script(LINES)
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
