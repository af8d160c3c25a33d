"""Damages files of every format that is read, and counts what becomes of them.

Example:
  python -m tools.damage --count=2000

Flips one bit, or cuts the file, at random places of small files that real writers made. Each must
be an error of one line, or the values as they were. Other values may come of formats, or parts of
them, that carry no checksum; they are counted. Any other exception ends the command.
"""

import argparse
import collections
import functools
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from microdit_jax.convert.formats.safetensors_file import write_safetensors
from microdit_jax.convert.formats.torch_file import write_torch
from microdit_jax.convert.inputs import read_tensors
from microdit_jax.convert.vae import infer_config
from microdit_jax.data.mds import MdsReader
from microdit_jax.errors import UserError
from microdit_jax.prepare.sources.registry import open_source

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
TORCH, MDS, IMAGES = GOLDEN / "torch_files", GOLDEN / "mds", GOLDEN / "image_datasets"


def tensors(path: Path) -> object:
    """Bytes of all tensors of a checkpoint."""
    found = read_tensors((path,), None).tensors
    return {name: (t.dtype.name, t.shape, t.tobytes()) for name, t in found.items()}


def mds(path: Path) -> object:
    """All samples of the dataset that a shard is of."""
    return [dict(sample) for sample in MdsReader(path.parent, check_hashes=True)]


def images(source: str, path: Path) -> object:
    """All images of a source with their captions; the ids of those that are skipped."""
    opened, good, bad = open_source(source, str(path)), {}, []
    for part in range(len(opened.parts)):
        for found in opened.read(part):
            try:
                data = None if found.skip_reason is not None else found.load()
                good[found.id] = (found.caption, data if isinstance(data, bytes) else None)
            except (OSError, ValueError):  # as the job counts it
                bad.append(found.id)
    return {key: value for key, value in good.items() if value[1] is not None}


def config(path: Path) -> object:
    """The config of a VAE, as a config.json states it."""
    try:
        given = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(str(error)) from error
    if not isinstance(given, dict):
        raise UserError("no object")
    return infer_config(_vae_tensors(), given)


@functools.cache
def _vae_tensors() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "vae_small.npz") as file:
        start = "state_dict/"
        return {k.removeprefix(start): file[k] for k in file.files if k.startswith(start)}


class Format:
    """A file to damage: how it is read, and whether it carries checksums of its values."""

    def __init__(self, file: Path, read: Callable[[Path], object], *, checked: bool = False):
        self.file, self.read, self.checked = file, read, checked


def formats(folder: Path) -> dict[str, Format]:
    """Makes or copies a file of every format into a folder."""
    values = {"a": np.arange(60, dtype=np.float32).reshape(6, 10), "b": np.ones(7, np.float16)}
    write_torch(folder / "new.pt", values)
    write_safetensors(folder / "a.safetensors", values)
    with np.load(GOLDEN / "vae_small.npz") as file:
        (folder / "config.json").write_text(str(file["config"]))
    tar = next((IMAGES / "webdataset").rglob("*.tar"))
    rows = next((IMAGES / "hf_parquet").rglob("*.parquet"))
    table = pq.read_table(rows)
    pq.write_table(table, folder / "rows.parquet", write_page_checksum=True)
    shutil.copytree(MDS / "gz", folder / "mds")
    return {
        "pt": Format(folder / "new.pt", tensors, checked=True),
        "pt of Composer": Format(_copy(TORCH / "composer.pt", folder), tensors, checked=True),
        "legacy pt": Format(_copy(TORCH / "legacy.pt", folder), tensors),
        "safetensors": Format(folder / "a.safetensors", tensors),
        "config.json": Format(folder / "config.json", config),
        "tar": Format(_copy(tar, folder), lambda path: images("webdataset", path)),
        "parquet": Format(folder / "rows.parquet", lambda path: images("parquet", path)),
        "MDS with hashes": Format(next((folder / "mds").glob("*.mds.gz")), mds, checked=True),
    }


def _copy(path: Path, folder: Path) -> Path:
    return Path(shutil.copy(path, folder))


def damage(data: bytes, random: np.random.Generator) -> bytes:
    """Flips a bit, or cuts the end off."""
    position = int(random.integers(len(data)))
    if random.random() < 0.25:
        return data[:position]
    return (
        data[:position]
        + bytes([data[position] ^ 1 << int(random.integers(8))])
        + data[position + 1 :]
    )


def compare(found: object, expected: object) -> str:
    """Says what became of the values: of images some may be skipped, which the job counts."""
    if found == expected:
        return "equal"
    if isinstance(found, dict) and isinstance(expected, dict) and found.items() <= expected.items():
        return "some skipped"
    return "other values"


def run(name: str, made: Format, count: int) -> str:
    """Damages one file many times; returns a line of figures.

    Raises:
      AssertionError: other values, where checksums should have told.
    """
    good, random = made.file.read_bytes(), np.random.default_rng(0)
    expected, outcomes = made.read(made.file), collections.Counter()
    start = time.monotonic()
    for _ in range(count):
        made.file.unlink()  # views of the old file stay valid
        made.file.write_bytes(damage(good, random))
        for unpacked in made.file.parent.glob("*.mds"):
            unpacked.unlink()
        try:
            found = made.read(made.file)
        except UserError as error:
            assert str(error).isprintable(), error
            outcomes["refused"] += 1
            continue
        what = compare(found, expected)
        outcomes[what] += 1
        assert what != "other values" or not made.checked, f"{name}: {what} in spite of checksums"
    made.file.write_bytes(good)
    figures = ", ".join(f"{what} {n:,}" for what, n in sorted(outcomes.items()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return f"{name:16} {figures} ({time.monotonic() - start:.0f} s, peak {peak:.0f} MB)"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="times that each file is damaged")
    parser.add_argument("--only", help="one format by name")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, made in formats(Path(folder)).items():
            if flags.only in (None, name):
                print(run(name, made, flags.count), flush=True)


if __name__ == "__main__":
    main()
