"""Every path that is read or written: whole-or-not writes, bounded reads, checksums, the cache."""

from microdit_jax.files.fetched import fetched
from microdit_jax.files.held import HeldFolder
from microdit_jax.files.integrity import checksums, damage, sha256
from microdit_jax.files.places import cache_folder, shipped
from microdit_jax.files.reading import (
    inside,
    open_regular,
    parse_json,
    read_at_most,
    read_bytes,
    read_json,
    read_npz,
)
from microdit_jax.files.spool import OutputFolder, output_file, output_folder
from microdit_jax.files.writing import (
    atomic_file,
    atomic_folder,
    atomic_path,
    check_writable,
    disk_errors,
    write_bytes,
    write_json,
    write_text,
)

__all__ = [
    "HeldFolder",
    "OutputFolder",
    "atomic_file",
    "atomic_folder",
    "atomic_path",
    "cache_folder",
    "check_writable",
    "checksums",
    "damage",
    "disk_errors",
    "fetched",
    "inside",
    "open_regular",
    "output_file",
    "output_folder",
    "parse_json",
    "read_at_most",
    "read_bytes",
    "read_json",
    "read_npz",
    "sha256",
    "shipped",
    "write_bytes",
    "write_json",
    "write_text",
]
