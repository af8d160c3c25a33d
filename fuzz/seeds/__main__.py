"""Writes every corpus; inputs that fuzzers found stay."""

from pathlib import Path

from fuzz.run import CORPORA
from fuzz.seeds import archives, checkpoint_files, columns, datasets, folders, messages, scores

MAKERS = {
    name: make
    for module in (archives, checkpoint_files, columns, datasets, folders, messages, scores)
    for name, make in module.MAKERS.items()
}


def write(root: Path = CORPORA) -> None:
    """Writes the corpora below a folder."""
    for target, make in MAKERS.items():
        folder = root / target
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            if not old.name.startswith("found"):
                old.unlink()
        for name, data in make().items():
            (folder / name).write_bytes(data)


if __name__ == "__main__":
    write()
