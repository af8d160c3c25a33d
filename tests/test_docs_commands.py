"""Every command in the docs is one that its program takes: flags, values and configuration keys.

`make test-commands` runs those that need no accelerator, download or hours.
"""

import ast
import json
import os
import subprocess
import sys

import pytest

from tools.doc_commands import pages, parsing, rules

FOUND = pages.all_commands()
# Flags that a mention in the text leaves out are its reader's.
LEFT_OUT = ("must be given", "are required", "expected one of the arguments", "'NAME'")
BRACKETS = str.maketrans("", "", "[]")


def complaints(calls: list[list[str]]) -> list[str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "tools.doc_commands.parsing"],
        cwd=pages.ROOT, env=environment, input=json.dumps(calls), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def parsed(command: pages.Command) -> list[list[str]]:
    """The calls of Python in a command, with values for the reader's own "..."."""
    text = command.text.replace("--config=...", "--config=configs/demo.py:pretrain")
    text = text.replace("--reports=... ", "")
    return pages.python_calls(text.translate(BRACKETS) if command.block < 0 else text)


def test_the_parsers_take_every_command():
    calls = [(command, call) for command in FOUND for call in parsed(command)]
    assert len(calls) > 90 and len({parsing.target(call)[0] for _, call in calls}) > 15
    wrong = []
    for (command, call), said in zip(calls, complaints([c for _, c in calls]), strict=True):
        partial = command.block < 0 and any(words in said for words in LEFT_OUT)
        if said and not partial:
            wrong.append(f"{command.page}: python {' '.join(call)}: {said}")
    assert not wrong, "\n".join(wrong)


def test_a_wrong_flag_or_key_is_noticed():
    said = complaints(
        [
            ["sample_main.py", "--prompt=x", "--solvr=ab3"],
            ["train_main.py", "--config=configs/finetune.py", "--workdir=x", "--config.lora.rnk=8"],
            ["train_main.py", "--config=configs/finetun.py", "--workdir=x"],
            ["-m", "convert", "--input=x", "--output=y", "--to=lora", "--base=z"],
            ["-m", "microdit_jax.prepare", "--source=folders", "--input=x", "--output=y"],
            ["-m", "microdit_jax.nothing"],
            ["-m", "microdit-sample", "--prompt=x"],
        ]
    )
    words = ("solvr", "rnk", "found No such file", "--base does not go", "folders", "nothing", "")
    for word, text in zip(words, said, strict=True):
        assert word in text and bool(word) == bool(text), text


def test_targets_of_make_exist():
    makefile = (pages.ROOT / "Makefile").read_text()
    named = {
        word
        for command in FOUND
        if (words := command.text.split())[0] == "make"
        for word in words[1:]
        if "=" not in word
    }
    assert len(named) > 8
    assert not {n for n in named if f"\n{n}:" not in makefile and not n.startswith("test-python")}


def test_every_rule_names_a_command():
    for rule in rules.RULES:
        assert rule.reason in rules.REASONS
        assert any(rules.reason(c) == rule.reason and rule.applies(c) for c in FOUND), rule
    run = [command for command in FOUND if not rules.reason(command)]
    assert len(run) >= 30


def test_commands_are_found():
    text = (
        "Run `make test`, or `python -m convert --input=FILE` and `--flag`.\n```bash\n"
        'A=1 python x.py --a="b # c" \\\n  --d  # why\nuntil python -m y; do sleep 1; done\n```\n'
    )
    found = pages.commands("p.md", text)
    assert [c.text for c in found] == [
        'A=1 python x.py --a="b # c" --d',
        "until python -m y; do sleep 1; done",
        "make test",
        "python -m convert --input=FILE",
    ]
    assert [c.mention for c in found] == [False, False, True, False]
    (quoted,) = pages.commands("p.md", 'Run `eval "$(python -m q cpu)"` first.')
    assert not quoted.mention
    calls = [call for command in found for call in pages.python_calls(command.text)]
    assert calls == [
        ["x.py", "--a=b # c", "--d"], ["-m", "y"], ["-m", "convert", "--input=FILE"],
    ]  # fmt: skip
    nested = 'ssh x --command="cd y && .venv/bin/python z.py --a"; eval "$(python -m q cpu)"'
    assert pages.python_calls(nested) == [["z.py", "--a"], ["-m", "q", "cpu"]]
    with pytest.raises(ValueError, match="in no language"):
        pages.commands("p.md", "```\nls\n```\n")


def test_commands_of_notebooks_are_found():
    (path,) = pages.notebooks()
    found = [command.text for command in pages.notebook_commands(path)]
    assert "python sample_main.py --model=instant" in " ".join(found) and len(found) >= 8
    assert all(command in FOUND for command in pages.notebook_commands(path))


def test_examples_in_python_can_be_imported():
    for path in pages.pages():
        for language, text in pages.blocks(path.read_text()):
            if language == "python":
                tree = ast.parse(text)
                lines: list[ast.stmt] = [
                    n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)
                ]
                exec(compile(ast.Module(lines, []), path.name, "exec"), {})
