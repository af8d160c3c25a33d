"""Faults in how files are written."""

MUTANTS = [
    {
        "name": "a file is written in place, so that a kill leaves half of it",
        "file": "microdit_jax/files/writing.py",
        "old": 'with partial.open("wb") as file:',
        "new": 'with open(path, "wb") as file:',
        "tests": ["tests/test_files.py"],
    },
]
