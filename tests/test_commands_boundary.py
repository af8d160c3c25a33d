"""Whatever a command is given, it ends with one line and a status that says what happened."""

import contextlib
import importlib
import io
import os
import sys

import pytest
from absl import app, flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_commands_flags import COMMANDS, flags_of

from microdit_jax.commands import boundary
from microdit_jax.errors import UserError

# Modules that define flags of several commands.
SHARED_FLAGS = ("microdit_jax.model_flags", "microdit_jax.commands.job_flags")
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
    "microdit_jax.app.__main__": ["microdit_jax.create.load", "microdit_jax.app.__main__.listen"],
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
    assert app.__name__ in flags.FLAGS.flags_by_module_dict()  # its import defined its own
    fresh = flags.FlagValues()
    for module, theirs in flags.FLAGS.flags_by_module_dict().items():
        for flag in theirs if module.startswith("absl") else ():
            fresh[flag.name] = flag
            fresh.register_flag_by_module(module, flag)
    before, loaded = dict(flags.FLAGS.__dict__), {}
    for module in (name, *SHARED_FLAGS):
        loaded[module] = sys.modules.pop(module, None)
    held = {}
    for module in SHARED_FLAGS:  # a package keeps what was imported of it
        package, _, own = module.rpartition(".")
        held[package, own] = vars(sys.modules[package]).pop(own, None)
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
        for (package, own), old in held.items():
            if old is not None:
                setattr(sys.modules[package], own, old)


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
    monkeypatch.setattr("microdit_jax.machine.compilation_cache.enable", lambda: None)
    monkeypatch.setattr("microdit_jax.xla.topologies.prepare", lambda name: None)
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
        # Here, since these import commands, whose flags must not meet those of other tests'.
        for target in WORK.get(name, ()):
            monkeypatch.setattr(target, begin)

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
