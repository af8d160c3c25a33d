"""Runs the commands of the docs as written, in a copy of the checkout, and says what each took.

  python -m tools.doc_commands --out=out/commands                    all pages (make test-commands)
  python -m tools.doc_commands --out=out/commands --pages=finetune   one page
  python -m tools.doc_commands --list                                what is run, and why others not

What `rules` names is left out. Sixty images are made for the pages that ask for one's own. The
same command as on an earlier page is not run again.
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command("tools.doc_commands.__main__")

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from microdit_jax.commands.parser import Parser
from microdit_jax.errors import UserError
from tools.doc_commands import images
from tools.doc_commands.pages import ROOT, Command, all_commands, python_calls
from tools.doc_commands.rules import REASONS, reason

LONGEST = 1800  # seconds for one command
SERVERS = ("microdit_jax.app", "microdit-app")  # run until they say their address
# Pages whose results others use come first: the reader of each is told to read these.
FIRST = ("docs/finetune.md", "docs/quickstart.md", "docs/training.md")


def found(names: Sequence[str]) -> list[Command]:
    """Returns the commands of these pages, or of all, each once."""
    seen: dict[str, Command] = {}
    for command in sorted(all_commands(), key=lambda command: command.page not in FIRST):
        if not names or pathlib.Path(command.page).stem in names:
            seen.setdefault(command.text, command)
    return list(seen.values())


def copy_checkout(folder: pathlib.Path) -> None:
    """Makes a copy of the tracked files, with this Python as .venv, and the pages' inputs."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    files = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)  # its time, too: make compares them
    (folder / ".venv").symlink_to(sys.prefix)
    images.write(folder / "photos")
    shutil.copy(folder / "photos" / "00.jpg", folder / "photo.jpg")
    images.write_mask(folder / "mask.png")


def runnable(command: Command) -> str:
    """Returns the line that the shell gets: a mention of a program as its --help."""
    if command.mention and python_calls(command.text):
        return f"{command.text} --help"
    return command.text


def run(command: Command, folder: pathlib.Path, log: pathlib.Path) -> tuple[int, float]:
    """Runs a command in the copy, its output into a file; returns its status and seconds."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    environment["PATH"] = f"{pathlib.Path(sys.prefix) / 'bin'}:{environment['PATH']}"
    environment["JAX_PLATFORMS"] = "cpu"
    line = runnable(command)
    serves = not command.mention and any(
        call[:1] == ["-m"] and call[1] in SERVERS for call in python_calls(command.text)
    )
    start = time.monotonic()
    with open(log, "wb") as output:
        child = subprocess.Popen(
            ["bash", "-c", f"set -e\n{line}"], cwd=folder, env=environment, stdout=output,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            while child.poll() is None and time.monotonic() - start < LONGEST:
                if serves and b"Open http" in log.read_bytes():
                    os.killpg(child.pid, signal.SIGINT)
                    return (0 if child.wait(30) in (0, 130) else 1), time.monotonic() - start
                time.sleep(0.1)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGTERM)
                child.wait()
    return child.returncode, time.monotonic() - start


def main(arguments: Sequence[str]) -> None:
    """The command; `arguments` without the program's name."""
    parser = Parser("tools.doc_commands", __doc__)
    add = parser.add_argument
    add("--out", type=pathlib.Path, default=ROOT / "out/commands", help="made anew; a copy, logs")
    add("--pages", default="", help="names of pages, with commas between; default: all")
    add("--list", action="store_true", help="say what would be run, and why the others are not")
    flags = parser.parse_args(arguments)
    chosen = found([name for name in flags.pages.split(",") if name])
    left_out = {command: why for command in chosen if (why := reason(command))}
    if flags.list:
        for command in chosen:
            why = left_out.get(command)
            print(f"{f'({REASONS[why]})' if why else 'RUN':<50} {command.page}: {command.text}")
        return
    folder = flags.out.absolute() / "checkout"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    copy_checkout(folder)
    failed = []
    for number, command in enumerate(c for c in chosen if c not in left_out):
        log = flags.out / f"{number:03}.log"
        status, seconds = run(command, folder, log)
        print(f"{status:>3} {seconds:>6.1f} s  {command.page}: {runnable(command)}", flush=True)
        if status:
            failed.append(f"{command.page}: {command.text} ({log})")
    print(f"{len(chosen) - len(left_out)} run, {len(left_out)} left out, {len(failed)} failed")
    if failed:
        raise UserError(f"expected all to end well, found {len(failed)}: {'; '.join(failed)}")
