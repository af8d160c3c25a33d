"""The fix that an error names works in the command that printed it: it has the flags in it."""

import ast
import functools
import importlib
import pathlib
import re

from test_layering import ROOT, modules

# Command's module -> how a text names it.
COMMANDS = {
    "train_main": "train_main.py",
    "sample_main": "sample_main.py",
    "microdit_jax.evaluate.__main__": "python -m microdit_jax.evaluate",
    "microdit_jax.app.__main__": "python -m microdit_jax.app",
    "microdit_jax.prepare.__main__": "python -m microdit_jax.prepare",
    "microdit_jax.prepare.reformat": "python -m microdit_jax.prepare.reformat",
    "microdit_jax.prepare.mds_index": "python -m microdit_jax.prepare.mds_index",
    "microdit_jax.convert.__main__": "python -m convert",
    "convert.parity": "python -m convert.parity",
    "microdit_jax.xla.aot.__main__": "python -m microdit_jax.xla.aot",
    "microdit_jax.xla.bench.__main__": "python -m microdit_jax.xla.bench",
    "microdit_jax.xla.plot": "python -m microdit_jax.xla.plot",
    "microdit_jax.training.report": "python -m microdit_jax.training.report",
    "microdit_jax.assets.publish": "python -m microdit_jax.assets.publish",
    "microdit_jax.commands.environment": "python -m microdit_jax.commands.environment",
}
# Loaded by name, which the import graph does not show.
BY_NAME = {"microdit_jax.convert.kinds": "microdit_jax.convert."}
# Imported by more, but what names flags there is only called by these.
ONLY_FOR = {
    "microdit_jax.machine.cluster": {"train_main", "microdit_jax.evaluate.__main__"},
    "microdit_jax.machine.preflight": {"train_main", "microdit_jax.evaluate.__main__"},
    "microdit_jax.machine.handshake": {"train_main", "microdit_jax.evaluate.__main__"},
    "microdit_jax.commands.cli": {"train_main", "microdit_jax.xla.aot.__main__"},
    "microdit_jax.commands.config_file": {"train_main", "microdit_jax.xla.aot.__main__"},
    "microdit_jax.convert.networks": {
        "microdit_jax.convert.__main__", "convert.parity", "microdit_jax.assets.publish",
    },
    "microdit_jax.convert.to_file": {
        "microdit_jax.convert.__main__", "microdit_jax.assets.publish",
    },
    "microdit_jax.prepare.job_folder": {
        "microdit_jax.prepare.__main__", "microdit_jax.prepare.reformat",
    },
    "microdit_jax.assets.load": {
        "sample_main", "microdit_jax.evaluate.__main__", "microdit_jax.app.__main__",
    },
    "microdit_jax.evaluate.sample_set": {"microdit_jax.evaluate.__main__"},
    "microdit_jax.evaluate.reference": {"microdit_jax.evaluate.__main__"},
    "microdit_jax.evaluate.scores": {"microdit_jax.evaluate.__main__"},
}  # fmt: skip
FLAG = r"--([a-z]\w+(?:\.[a-z]\w*)*)"
# What other programs are told.
OTHERS = r"pip install [^;)]*|srun [^;)]*|XLA_FLAGS=\S+|aws s3 [^;)]*|hf download [^;)]*"


def path_of(module: str) -> pathlib.Path:
    path = ROOT / module.replace(".", "/")
    return path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"


@functools.cache
def tree(module: str) -> ast.Module:
    return ast.parse(path_of(module).read_text())


def words(node: ast.AST) -> str:
    """The text of a string as the code writes it, with {} for what is put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(words(value) or "{}" for value in node.values)
    return ""


@functools.cache
def texts(module: str) -> list[str]:
    """All strings of a module but docstrings, and the help of flags."""
    left_out = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.JoinedStr):  # their parts are not texts of their own
            left_out |= {id(part) for value in node.values for part in ast.walk(value)}
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            left_out.add(id(node.value))
        if isinstance(node, ast.Call) and re.search(
            r"DEFINE_|add_argument|^add$|re\.", ast.unparse(node.func)
        ):
            left_out |= {id(part) for part in ast.walk(node)}
    nodes = [node for node in ast.walk(tree(module)) if id(node) not in left_out]
    found = [words(node) for node in nodes if isinstance(node, ast.JoinedStr | ast.Constant)]
    return [text for text in found if re.search(FLAG, text)]


@functools.cache
def flags_of(module: str) -> frozenset[str]:
    """The flags that a command defines, adopted ones and a config's keys included."""
    found = {"help"}
    for node in ast.walk(tree(module)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if re.search(r"DEFINE_|add_argument$|^add$", name) and node.args:
            flag = words(node.args[0]).removeprefix("--")
            if flag == "{}":  # flags by a table of the module
                tables = vars(importlib.import_module(module))
                found |= set(tables["OPTIONS"] if "OPTIONS" in tables else tables["SIZES"])
            found |= {flag, f"no{flag}"} if "boolean" in name else {flag}
        if "adopt_module_key_flags" in name:
            found |= flags_of(imported_as(ast.unparse(node.args[0]), module))
    if "config" in found and "absl" in ast.unparse(tree(module)):
        from microdit_jax.training import defaults

        found |= keys(defaults.base(), "config.")
    return frozenset(found)


def imported_as(name: str, module: str) -> str:
    """The full name of what a module imports by this one."""
    imports = [node for node in ast.walk(tree(module)) if isinstance(node, ast.ImportFrom)]
    return next(
        f"{node.module}.{name}" for node in imports if name in [alias.name for alias in node.names]
    )


def keys(config, prefix: str) -> set[str]:
    found = set()
    for key, value in config.items():
        found.add(prefix + key)
        found |= keys(value, f"{prefix}{key}.") if hasattr(value, "items") else set()
    return found


@functools.cache
def import_graph() -> dict[str, set[str]]:
    graph = modules()
    for module, prefix in BY_NAME.items():
        graph[module] |= {name for name in graph if name.startswith(prefix)}
    return graph


@functools.cache
def reachable(command: str) -> set[str]:
    """The modules whose errors a command can print, imported at its start or later."""
    graph = import_graph()
    seen, todo = set(), [command]
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        for name in graph[module]:
            parts = name.split(".")  # of a package its __init__ too; what ours imports comes later
            todo += [p for n in range(1, len(parts)) if (p := ".".join(parts[: n + 1])) in graph]
    others = set(COMMANDS) - {command}
    return {m for m in seen - others if command in ONLY_FOR.get(m, {command})}


def wrong_flags(text: str, running: frozenset[str]) -> list[str]:
    """The flags in a text that the command it names, or else the running one, does not have."""
    wrong = []
    for sentence in re.split(r"[;(),]", re.sub(OTHERS, "", text)):
        named = re.search(r"(python -m [\w.]+|\w+_main\.py)(.*)", sentence)
        before = sentence[: named.start()] if named else sentence
        wrong += [flag for flag in re.findall(FLAG, before) if flag not in running]
        if named:
            by_name = {name: module for module, name in COMMANDS.items()}
            if named[1] not in by_name:
                wrong.append(named[1])
                continue
            known = flags_of(by_name[named[1]])
            wrong += [flag for flag in re.findall(FLAG, named[2]) if flag not in known]
    return wrong


def test_errors_name_flags_that_there_are():
    found = {}
    for command in COMMANDS:
        for module in sorted(reachable(command)):
            for text in texts(module):
                for flag in wrong_flags(text, flags_of(command)):
                    key = (module, flag, text if len(text) < 200 else text[:200])
                    found.setdefault(key, []).append(command.removeprefix("microdit_jax."))
    assert not found, "\n".join(
        f"{module}: --{flag} in {text!r} is no flag of {', '.join(commands)}"
        for (module, flag, text), commands in found.items()
    )


def test_what_is_only_for_some_is_for_these():
    for module, commands in ONLY_FOR.items():
        assert all(module in reachable(command) and texts(module) for command in commands), module


def test_a_flag_of_another_command_is_noticed():
    assert flags_of("train_main") >= {"config", "workdir", "config.data.cache", "help"}
    assert flags_of("sample_main") >= {"prompt", "vae", "fsdp"}
    sampling = flags_of("sample_main")
    assert "microdit_jax.sampling.pipeline" in reachable("microdit_jax.evaluate.__main__")
    assert wrong_flags("give --vae or --activation=gelu; see --help", sampling) == ["activation"]
    convert = "convert it first with python -m convert --activation={}"
    assert wrong_flags(f"found none; {convert}", sampling) == []
    assert wrong_flags(f"found none; {convert} --prompt=x", sampling) == ["prompt"]
    assert wrong_flags("see python -m microdit_jax.nothing --help", sampling)
    assert wrong_flags("pip install --upgrade x; XLA_FLAGS=--xla_y", sampling) == []
