"""Puts each fault of tools/mutants into a copy of the checkout and runs the tests that must fail.

A fault that no test notices survives; the command ends with status 1 if more than one in twenty do.
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command("tools.mutants.__main__")

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import tqdm

from microdit_jax.commands.parser import Parser
from microdit_jax.errors import UserError
from tools.mutants import ROOT, Mutant, all_mutants

EXAMPLE = """example:
  python -m tools.mutants --only=core --jobs=2
"""
LEAST_SHARE = 0.95  # of the faults that must be noticed
SECONDS = 900  # for the tests of one fault; a fault that makes them hang longer is noticed


def copy_checkout(folder: Path) -> None:
    """Copies the files that git knows or would add, so that a fault never touches the checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def run_tests(folder: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Runs tests in a copy of the checkout; returns pytest's exit status and its last lines."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return 1, f"no end after {SECONDS} s"
    return done.returncode, "\n".join((done.stdout + done.stderr).splitlines()[-15:])


def verdict(folder: Path, mutant: Mutant) -> str:
    """Puts one fault in, runs its tests, takes it out; "killed", "survived" or what went wrong."""
    path = folder / mutant.file
    original = path.read_text()
    try:
        path.write_text(original.replace(mutant.old, mutant.new))
        status, words = run_tests(folder, mutant.tests)
    finally:
        path.write_text(original)
    # 2: a module that no longer imports; 4 and 5: no such test.
    return {0: "survived", 1: "killed", 2: "killed"}.get(status, f"cannot run: {words}")


def main(arguments: Sequence[str]) -> None:
    parser = Parser("tools.mutants", __doc__, EXAMPLE)
    parser.add_argument("--only", help="a room, or a part of a fault's name")
    parser.add_argument("--jobs", type=int, default=2, help="copies at work at once (default: 2)")
    flags = parser.parse_args(arguments)
    if flags.jobs < 1:
        raise UserError(f"--jobs must be at least 1, found {flags.jobs}")
    mutants = [m for m in all_mutants() if (flags.only or "") in f"{m.room}: {m.name}"]
    if not mutants:
        raise UserError(f"expected faults for --only={flags.only}, found none; see tools/mutants/")
    if stale := [f"{m.name}: {m.fault_of_entry()}" for m in mutants if m.fault_of_entry()]:
        raise UserError(f"expected entries that fit the code, found {'; '.join(stale)}")
    with tempfile.TemporaryDirectory() as temporary:
        folders: Queue[Path] = Queue()
        for number in range(flags.jobs):
            folder = Path(temporary, str(number))
            copy_checkout(folder)
            folders.put(folder)

        def judge(mutant: Mutant) -> str:
            folder = folders.get()
            try:
                return verdict(folder, mutant)
            finally:
                folders.put(folder)

        whole = folders.get()
        tests = sorted({test for mutant in mutants for test in mutant.tests})
        print(f"{len(tests)} tests without a fault", flush=True)
        status, words = run_tests(whole, tests)
        if status:
            raise UserError(f"expected the tests to pass without a fault, found:\n{words}")
        folders.put(whole)
        with ThreadPoolExecutor(flags.jobs) as pool:
            shown = tqdm.tqdm(pool.map(judge, mutants), total=len(mutants), unit="fault")
            verdicts = list(shown)
    killed = verdicts.count("killed")
    for mutant, found in zip(mutants, verdicts, strict=True):
        if found != "killed":
            print(f"{found}: {mutant.room}: {mutant.name} ({mutant.file})")
    print(f"{killed} of {len(mutants)} faults noticed ({killed / len(mutants):.0%})")
    if killed < LEAST_SHARE * len(mutants):
        sys.exit(1)
