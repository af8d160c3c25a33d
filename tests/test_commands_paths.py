"""Every flag that takes a path is on record; a URL works or is refused before any work."""

import ast
import importlib
import os
import re
import sys
from typing import Any

import pytest
from ml_collections import ConfigDict
from test_commands_flags import COMMANDS, imported_as, tree, words
from test_layering import ROOT

from microdit_jax.commands import boundary, paths
from microdit_jax.commands.paths import PLACES, TEXTS, check_stores
from microdit_jax.errors import UserError
from microdit_jax.files import atomic_folder, atomic_path, write_text
from microdit_jax.files.urls import scheme_of
from microdit_jax.training import defaults

# Texts that name something else than a file. A flag that is new belongs here or into
# microdit_jax.commands.paths.
NAMES = {
    *("activation", "apg", "arch", "attention", "caption_column", "churn", "compression"),
    *("dtype", "license", "repository", "seed"),
    *("expert", "guidance", "guidance_interval", "guidance_scale", "host", "image_column"),
    *("library_python", "metrics", "micro_batches", "moe", "platform", "remat", "resolutions"),
    *("schedule", "seeds", "solver", "split", "threads", "topology", "weights", "what"),
    *("config.data.captions", "config.data.datasets.source", "config.data.heldout.source"),
    *("config.eval.evaluators", "config.model.arch", "config.optim.name"),
    *("config.train.gradient_dtype",),
}
# Of the config's own subtree, checked when a network is made.
OPTIONS = re.compile(r"config\.model\.options\..*")
URL = "gs://bucket/some/where"


def text_flags_of(module: str) -> set[str]:
    """The flags that a command defines and that take any text, adopted ones and keys included."""
    found = set()
    for node in ast.walk(tree(module)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if "adopt_module_key_flags" in name:
            found |= text_flags_of(imported_as(ast.unparse(node.args[0]), module))
        if not re.search(r"DEFINE_|add_argument$|^add$", name) or not node.args:
            continue
        flag = words(node.args[0]).removeprefix("--")
        if flag == "{}":  # flags by a table of the module, with the type of each
            tables = vars(importlib.import_module(module))
            table = tables["OPTIONS"] if "OPTIONS" in tables else tables["SIZES"]
            types = {k: v.get("type") if isinstance(v, dict) else v for k, v in table.items()}
            found |= {k for k, kind in types.items() if kind not in (int, float)}
        elif re.search("string|list|config_file", name):
            found.add(flag)
        elif "DEFINE" not in name and "choices" not in options:
            if options.get("type") not in ("int", "float") and "store_true" not in str(options):
                found |= set() if "Boolean" in options.get("action", "") else {flag}
    if "config" in found and "absl" in ast.unparse(tree(module)):
        config = defaults.base()
        with config.unlocked():
            config.data.datasets = ({"source": "latents", "folder": "x"},)
        found |= {name for name, _ in paths._texts({"config": config})}
    return found


def key_of(module: str) -> str:
    """How PLACES names a command."""
    return "convert" if module == "microdit_jax.convert.__main__" else module.removesuffix(
        ".__main__"
    )  # fmt: skip


@pytest.mark.parametrize("module", COMMANDS)
def test_each_flag_that_takes_text_is_a_path_or_is_not(module):
    found = {flag for flag in text_flags_of(module) if not OPTIONS.fullmatch(flag)}
    places = PLACES.get(key_of(module), {})
    empty = {"config.init_from", "config.init_weights_from", "config.teacher"} & places.keys()
    assert found - NAMES - TEXTS == places.keys() | empty


def test_no_command_is_left_out():
    assert PLACES.keys() | {"microdit_jax.commands.environment"} == set(map(key_of, COMMANDS))


def refused(command: str, values: dict) -> str:
    with pytest.raises(UserError) as error:
        check_stores(command, values)
    assert "\n" not in str(error.value)
    return str(error.value)


def nested(name: str, value: str) -> dict:
    found: Any = value
    for key in reversed(name.split(".")):
        found = {key: found}
    return found


@pytest.mark.parametrize("command", PLACES)
def test_a_url_is_refused_in_one_line_where_it_does_not_work(command):
    for name, place in PLACES[command].items():
        for scheme in ("gs", "s3", "memory", "https", "ftp"):
            values = nested(name, f"{scheme}://bucket/x")
            if scheme in place.stores:
                check_stores(command, values)
            else:
                assert f"--{name}, found {scheme}://bucket/x;" in refused(command, values)


def test_a_flag_that_nobody_knows_takes_no_url():
    assert "--new" in refused("sample_main", {"new": [URL]})
    assert "--x" in refused("benchmarks.sampling", {"x": URL})


def test_texts_may_be_urls_and_local_paths_are_not():
    check_stores("sample_main", {"prompt": ["a", URL], "out": "out", "model": "openclip:hf-hub:a"})
    check_stores("sample_main", {"out": "./gs:/x", "model": None, "seed": 3})


@pytest.mark.parametrize("path", ["gs://b/x", "gs:/b/x", "S3://b", "memory://x", "abc+d://x"])
def test_what_pathlib_makes_of_a_url_is_one_too(path):
    assert scheme_of(path)
    assert "--vae" in refused("sample_main", {"vae": path})


def test_keys_of_a_configuration_are_looked_at_in_every_stage():
    config = defaults.stages(one=defaults.base(), two=defaults.base())
    check_stores("train_main", {"config": config})
    with config.unlocked():
        config.two.data.datasets = ({"source": "latents", "folder": URL, "weight": 1.0},)
        config.two.eval.prompts = (URL,)
    check_stores("train_main", {"config": config, "config.two.data.datasets": URL})
    with config.unlocked():
        config.two.data.cache = URL
    assert "--config.data.cache, found gs:" in refused("train_main", {"config": config})
    assert isinstance(config, ConfigDict)


@pytest.mark.parametrize(
    "write", [lambda path: write_text(path, "x"), lambda path: _use(atomic_path, path),
    lambda path: _use(atomic_folder, path)],
)  # fmt: skip
def test_no_file_below_a_folder_named_as_a_store_is_written(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="expected a local path, found the URL gs://"):
        write(URL)
    assert not os.listdir(tmp_path)


def _use(context, path):
    with context(path):
        pass


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("microdit_jax.convert.__main__", ["--input=x.pt", "--output=ftp://bucket/x"]),
        ("microdit_jax.prepare.__main__", ["--source=emoji", "--output=x", f"--cache={URL}"]),
        ("microdit_jax.xla.plot", ["--reports=ftp://bucket/x"]),
        ("microdit_jax.training.report", ["--runs=x", "--out=ftp://bucket/x"]),
    ],
)
def test_commands_end_with_status_2(module, arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x"])
    main = importlib.import_module(module).main
    assert boundary.outcome(lambda: main(arguments), arguments) == 2
    assert "://bucket/" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


# ---------------------------------------------------------------- docs/scaling.md
def table() -> str:
    """The table of docs/scaling.md: what works, on which store."""
    rows = ["| command | flags and keys | gs:// | s3:// |", "|---|---|---|---|"]
    for command, places in PLACES.items():
        groups: dict[tuple[str, ...], list[str]] = {}
        for name, place in places.items():
            works = tuple("works" if s in place.stores else "refused" for s in ("gs", "s3"))
            groups.setdefault(works, []).append(f"`{name}`")
        short = command.removeprefix("microdit_jax.")
        for works, names in groups.items():
            rows.append(f"| {short} | {', '.join(names)} | {' | '.join(works)} |")
    return "\n".join(rows)


def test_the_docs_have_the_table_as_it_is():
    assert table() in (ROOT / "docs" / "scaling.md").read_text()
