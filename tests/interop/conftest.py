"""Files made by the real writers, in the Python that $INTEROP_PYTHON names (make test-interop)."""

import os
import pathlib
import subprocess
import sys

import pytest

WRITERS = pathlib.Path(__file__).parent / "writers"
SUPPORT = pathlib.Path(__file__).parents[1] / "support"


def needs(*packages: str) -> str:
    """Returns the Python with these packages, or skips the test."""
    python = os.environ.get("INTEROP_PYTHON")
    if not python:
        pytest.skip("no Python with the writers: make test-interop, or name one in $INTEROP_PYTHON")
    found = subprocess.run(
        [python, "-c", f"import importlib.util as u; assert all(map(u.find_spec, {packages!r}))"],
        capture_output=True,
    )
    if found.returncode:
        pytest.skip(f"not all of {', '.join(packages)} are in {python}")
    return python


def write(script: str, *arguments: object, packages: tuple[str, ...] = ("torch",)) -> None:
    """Runs one of the writers."""
    python = needs(*packages)
    path = next(f / script for f in (WRITERS, SUPPORT) if (f / script).exists())
    done = subprocess.run(
        [python, str(path), *map(str, arguments)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="session")
def checkout() -> pathlib.Path:
    """A checkout of the reference, or skips the test."""
    folder = os.environ.get("MICRO_DIFFUSION")
    if not folder:
        pytest.skip("no checkout of micro_diffusion: name one in $MICRO_DIFFUSION")
    return pathlib.Path(folder)


sys.path.insert(0, str(SUPPORT.parent))  # support and conftest of the other tests
