"""Faults in how files are written."""

MUTANTS = [
    {
        "name": "a file is written in place, so that a kill leaves half of it",
        "file": "microdit_jax/files/writing.py",
        "old": 'with atomic_path(path, num_bytes, replace=replace) as partial, partial.open("wb")',
        "new": 'with open(path, "wb")',
        "tests": ["tests/test_files.py"],
    },
]
