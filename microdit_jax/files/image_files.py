"""The one place where image files are opened: formats, pixels, scans and strips are bounded.

Pillow opens some forty formats, whatever a file's name says; one of them starts Ghostscript.
"""

import contextlib
import io
import os
import re
import struct
from collections.abc import Iterator

from PIL import Image, features

from microdit_jax.files.reading import read_bytes

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
FORMATS += ("AVIF",) if features.check("avif") else ()  # not in every build of Pillow
# 300 MB for one image in memory; a larger one is refused before it is decoded.
MAX_PIXELS = 100_000_000
MAX_BYTES = 4 * MAX_PIXELS  # of a file: RGBA, uncompressed
# A scan of a progressive JPEG costs 14 bytes of the file and goes over all pixels: 0.1 s at most.
# Cameras and libraries write up to 20, and a thumbnail's.
_MAX_SCANS = 64
# Pillow lists a TIFF's strips one by one: 300 bytes and 10 us for 8 bytes of the file.
_MAX_STRIPS = 100_000
_JPEG_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
_TIFF_OFFSETS = (273, 324)  # StripOffsets, TileOffsets


class UnusableImage(ValueError):
    """An image without pixels, or that takes too much memory or time; the message is a reason."""


@contextlib.contextmanager
def open_image(
    source: bytes | str | os.PathLike,
    *,
    max_pixels: int = MAX_PIXELS,
    formats: tuple[str, ...] = FORMATS,
) -> Iterator[Image.Image]:
    """Opens an image file of any origin; its pixels are not decoded yet.

    Args:
      source: a path, or the file's bytes.
    Raises:
      OSError: the file cannot be opened. Pillow's error for what is no image of `formats` is one.
      UserError: a path that is no regular file, or a file of more than MAX_BYTES.
      UnusableImage: see the limits above.
      Exception: Pillow passes on any exception that its decoders raise, here and when the image is
        loaded.
    """
    data = source if isinstance(source, bytes) else read_bytes(source, MAX_BYTES)
    if (scans := _jpeg_scans(data)) > _MAX_SCANS:
        raise UnusableImage(f"a JPEG of {scans} scans")
    if (strips := _tiff_strips(data)) > _MAX_STRIPS:
        raise UnusableImage(f"a TIFF of {strips} strips")
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError as error:
        raise UnusableImage(f"more than {max_pixels // 10**6} megapixels") from error
    with image:
        check_pixels(image, max_pixels)
        yield image


def check_pixels(image: Image.Image, max_pixels: int) -> None:
    """Raises UnusableImage for an image without pixels or with too many."""
    if not image.width * image.height:
        raise UnusableImage("no pixels")
    if image.width * image.height > max_pixels:
        raise UnusableImage(f"more than {max_pixels // 10**6} megapixels")


def _jpeg_scans(data: bytes) -> int:
    """Counts the scans of a JPEG; 0 for other files, and at most 64 may be a guess."""
    if not data.startswith(b"\xff\xd8"):
        return 0
    guess = data.count(b"\xff\xda")  # those in thumbnails and in what follows the image too
    if guess <= _MAX_SCANS:
        return guess
    at, scans = 2, 0
    while (found := _JPEG_MARKER.search(data, at)) and found[1] != b"\xd9":
        scans += found[1] == b"\xda"
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    return scans


def _tiff_strips(data: bytes) -> int:
    """Counts the strips or tiles of a TIFF's first image as its header tells; 0 for other files."""
    if data[:2] not in (b"II", b"MM"):
        return 0
    order = "<" if data[:2] == b"II" else ">"
    is_big = data[2:3] == b"+"  # BigTIFF; Pillow looks at this byte alone
    most = 0
    # Where the file is cut off, Pillow reads what comes before the cut too.
    with contextlib.suppress(struct.error, OverflowError):
        (start,) = struct.unpack_from(f"{order}{'Q' if is_big else 'L'}", data, 8 if is_big else 4)
        (entries,) = struct.unpack_from(f"{order}{'Q' if is_big else 'H'}", data, start)
        start += 8 if is_big else 2
        entry = struct.Struct(f"{order}HH{'Q8x' if is_big else 'L4x'}")
        for at in range(start, start + min(entries, 1 << 16) * entry.size, entry.size):
            tag, _, count = entry.unpack_from(data, at)
            most = max(most, count if tag in _TIFF_OFFSETS else 0)
    return most
