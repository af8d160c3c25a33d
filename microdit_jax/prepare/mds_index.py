"""Makes the lost index.json of an MDS dataset from the headers of its shards.

Example:
  python -m microdit_jax.prepare.mds_index --input=latents/cc12m

Each shard holds a copy of its columns and the number of its samples. What only the index had is
lost: hashes of the files, and an order other than that of their names.
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command("microdit_jax.prepare.mds_index")

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from microdit_jax.commands.parser import Parser
from microdit_jax.data import compression
from microdit_jax.data.mapped import map_file
from microdit_jax.data.mds_format import INDEX, SUFFIX, check_header, parse_shard
from microdit_jax.errors import UserError, visible
from microdit_jax.files import check_writable, open_regular, parse_json
from microdit_jax.prepare.mds_writer import write_index

MAX_BYTES = 2**32 - 1  # of a shard, whose offsets are u32
COLUMNS = ("column_names", "column_encodings", "column_sizes")


def rebuild_index(folder: Path) -> tuple[int, int]:
    """Writes index.json over all shards in a folder and below, in order of name.

    Returns:
      the numbers of shards and of samples.
    Raises:
      UserError: there is an index already, no shard, or a damaged one; nothing is written.
    """
    if (folder / INDEX).exists():
        raise UserError(
            f"expected no {INDEX} in {visible(folder)}, found one; remove it first if it is damaged"
        )
    entries: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob(f"*{SUFFIX}*")):
        stem, _, method = path.name.partition(SUFFIX)
        if path.is_file() and (not method or method.removeprefix(".") in compression.NAMES):
            raw = (path.parent / f"{stem}{SUFFIX}").relative_to(folder).as_posix()
            found = _entry(path, raw, path.relative_to(folder).as_posix(), method.removeprefix("."))
            # Beside a compressed shard may lie the one that a reader unpacked.
            entries[raw] = found if method or raw not in entries else entries[raw]
    if not entries:
        raise UserError(f"expected shards (*{SUFFIX}) in {visible(folder)}, found none")
    write_index(folder, list(entries.values()))
    return len(entries), sum(entry["samples"] for entry in entries.values())


def _entry(path: Path, raw: str, name: str, method: str) -> dict[str, Any]:
    """A shard's entry in the index, from its own header, which must be whole.

    Args:
      raw, name: of the uncompressed file and of this one, within the dataset.
      method: of its compression, "" for none.
    """
    try:
        with open_regular(path) as file:
            data = map_file(file)
        size = len(data)
        if method:
            data = compression.decompress_unsized(method, bytes(data), MAX_BYTES)
        samples = int.from_bytes(data[:4], "little")
        header = 4 + 4 * (samples + 1)
        if header > len(data):
            raise ValueError(f"{samples} samples in {len(data)} bytes")
        first = int(np.frombuffer(data[4:8], "<u4")[0])
        columns = parse_json(bytes(data[header:first]))
        entry = {
            **{"version": 2, "format": "mds", "hashes": [], "samples": samples},
            **{"size_limit": columns.get("size_limit"), "compression": method or None},
            **{key: columns[key] for key in COLUMNS},
            "raw_data": {"basename": raw, "bytes": len(data), "hashes": {}},
            "zip_data": {"basename": name, "bytes": size, "hashes": {}} if method else None,
        }
        check_header(str(path), parse_shard(entry), data)
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"expected a shard with its columns in the header in {visible(path)}, found something "
            f"else ({type(error).__name__}: {visible(error, 200)}); copy it again, or remove it"
        ) from error
    return entry


def main(arguments: Sequence[str]) -> None:
    """The command; `arguments` without the program's name."""
    parser = Parser("microdit_jax.prepare.mds_index", __doc__)
    parser.add_argument("--input", required=True, type=Path, help="the folder with the shards")
    folder = parser.parse_args(arguments).input
    check_writable(folder / INDEX)
    shards, samples = rebuild_index(folder)
    print(f"{visible(folder / INDEX)}: {shards:,} shards with {samples:,} samples")
