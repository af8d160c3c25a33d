"""Faults that a user would suffer from, and the tests that must notice each of them.

One file for each room, each with a list MUTANTS of
  {"name": in words, "file": path, "old": text that stands there once, "new": text, "tests": [...]}
`make mutants` puts the faults in one at a time, into a copy, and runs their tests.
"""

import importlib
import pkgutil
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Mutant(NamedTuple):
    """One fault: `old`, which stands once in `file`, becomes `new`; then a test must fail."""

    room: str
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def fault_of_entry(self) -> str:
        """Says why the entry no longer fits the code, "" if it does."""
        path = ROOT / self.file
        if not path.is_file():
            return f"{self.file} is no file"
        if (count := path.read_text().count(self.old)) != 1:
            return f"{self.old!r} stands {count} times in {self.file}, not once"
        missing = [test for test in self.tests if not (ROOT / test.split("::")[0]).is_file()]
        return f"no test file {', '.join(missing)}" if missing or not self.tests else ""


def all_mutants() -> list[Mutant]:
    """Every entry of every file of this folder."""
    found = []
    for info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if info.name.startswith("_"):
            continue
        for entry in importlib.import_module(f"{__name__}.{info.name}").MUTANTS:
            found.append(Mutant(room=info.name, **(entry | {"tests": tuple(entry["tests"])})))
    return found
