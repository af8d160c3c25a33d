"""The output of commands: a terminal acts upon progress bars, and upon nothing else."""

import pytest
from test_commands_processes import script

HOSTILE = "x\x1b]0;title\x07\x1b[2Jx\rover\u202e\x9b\x08\x00"
SHOWN = "x\\x1b]0;title\\x07\\x1b[2Jx\\rover\\u202e\\x9b\\x08\\x00"


def output_of(body: str, *arguments: str) -> tuple[str, str]:
    process = script(body, *arguments, text=False)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    return out.decode(), error.decode()


@pytest.mark.parametrize(
    "body",
    [
        "print(TEXT)",
        "print(TEXT, file=sys.stderr)",
        "import logging; logging.basicConfig(format='%(message)s'); logging.warning(TEXT)",
        "import warnings; warnings.showwarning(TEXT, UserWarning, '', 0)",
        "from absl import logging; logging.error(TEXT)",
        "import traceback\ntry: raise ValueError(TEXT)\nexcept ValueError: traceback.print_exc()",
        "import tqdm; tqdm.tqdm.write(TEXT)",
        "import tqdm; bar = tqdm.tqdm(total=1, desc=TEXT); bar.update(); bar.close()",
    ],
)
def test_every_way_to_print(body):
    out, error = output_of(f"TEXT = {HOSTILE!r}\n{body}")
    assert SHOWN in out + error
    kept = (out + error).replace("\n", "").replace("\t", "")
    assert kept.replace("\r", "").isprintable() and "\rover" not in kept


def test_progress_bars_and_plain_texts_pass():
    _, error = output_of(
        "import tqdm\nfor _ in tqdm.trange(2, desc='outer'):\n"
        "    for _ in tqdm.trange(2, desc='inner', leave=False): pass"
    )
    assert "\x1b[A" in error and "\router" in error and "\rinner" in error and "\\" not in error
    out, _ = output_of("print('a\\tb', 'красный 👨\\u200d👩', end='\\n\\n')")
    assert out == "a\tb красный 👨\u200d👩\n\n"


def test_write_says_how_much_it_took():
    out, _ = output_of("print(sys.stdout.write('\\x1b'), sys.stdout.write(''))")
    assert out == "\\x1b1 0\n"
