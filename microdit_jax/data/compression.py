"""Compresses and decompresses whole MDS shards: zstd, gz, bz2, br (Brotli), snappy."""

import mmap

import cramjam

_MODULES = {
    "zstd": cramjam.zstd,
    "gz": cramjam.gzip,
    "bz2": cramjam.bzip2,
    "br": cramjam.brotli,
}
NAMES = (*_MODULES, "snappy")
_DEFAULT_LEVELS = {"zstd": 3, "gz": 9, "bz2": 9, "br": 11}


def parse_compression(name: str) -> tuple[str, int | None]:
    """Splits "zstd:7" into ("zstd", 7); raises ValueError for an unknown algorithm."""
    algorithm, _, level = name.partition(":")
    if algorithm not in NAMES or (level and not level.isdecimal()):
        raise ValueError(f"unknown compression {name!r}, known are {', '.join(NAMES)}")
    return algorithm, int(level) if level else None


def decompress(name: str, data: bytes, size: int) -> memoryview:
    """Decompresses to exactly `size` bytes; takes memory for what there is, and never for more.

    Raises:
      ValueError: `data` is damaged, or holds another number of bytes.
    """
    algorithm, _ = parse_compression(name)
    if not size:
        return memoryview(b"")
    try:
        out = mmap.mmap(-1, size)  # pages that nothing is written to take no memory
        if algorithm == "snappy":  # its raw format says the size first
            if cramjam.snappy.decompress_raw_len(data) != size:
                raise ValueError("it says another size")
            written = cramjam.snappy.decompress_raw_into(data, out)
        else:
            written = _MODULES[algorithm].decompress_into(data, out)
    except (cramjam.DecompressionError, ValueError, OSError, OverflowError) as error:
        raise ValueError(f"{algorithm} data do not decompress to {size} bytes: {error}") from error
    if written != size:
        raise ValueError(f"{algorithm} data decompress to {written} bytes, expected {size}")
    return memoryview(out)


def decompress_unsized(name: str, data: bytes, most: int) -> memoryview:
    """Decompresses data of unknown size, of at most `most` bytes.

    Raises:
      ValueError: `data` is damaged, or holds more.
    """
    algorithm, _ = parse_compression(name)
    try:
        if algorithm == "snappy":
            return decompress(name, data, min(most, cramjam.snappy.decompress_raw_len(data)))
        out = mmap.mmap(-1, most)  # pages that nothing is written to take no memory
        written = _MODULES[algorithm].decompress_into(data, out)
    except (cramjam.DecompressionError, ValueError, OSError, OverflowError) as error:
        raise ValueError(f"{algorithm} data do not decompress: {error}") from error
    return memoryview(out)[:written]


def compress(name: str, data: bytes) -> bytes:
    """Compresses by an algorithm, and optionally a level, such as "zstd" or "gz:6"."""
    algorithm, level = parse_compression(name)
    if algorithm == "snappy":
        return bytes(cramjam.snappy.compress_raw(data))
    level = _DEFAULT_LEVELS[algorithm] if level is None else level
    return bytes(_MODULES[algorithm].compress(data, level=level))
