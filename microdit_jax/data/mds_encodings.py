"""Encodes and decodes the columns of MDS shards, without running stored code.

The encodings are those of mosaicml-streaming 0.13, little endian, except `pkl`, which is code.
Images stored as JPEG or PNG files stay bytes: `microdit_jax.prepare` decodes them safely.
"""

import decimal
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from microdit_jax.files import parse_json

_SCALARS = {
    name: np.dtype(name).newbyteorder("<")
    for name in (
        *("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "float32", "float64"),
    )
}
_CODE_OF_DTYPE = {
    "uint8": 8, "int8": 9, "uint16": 16, "int16": 17, "float16": 18, "uint32": 32, "int32": 33,
    "float32": 34, "uint64": 64, "int64": 65, "float64": 66,
}  # fmt: skip
_DTYPE_OF_CODE = {code: name for name, code in _CODE_OF_DTYPE.items()}
# Bytes per pixel in Pillow's raw modes; "1" packs eight pixels into a byte, row by row.
_PIXEL_BYTES = {
    "L": 1, "P": 1, "LA": 2, "La": 2, "PA": 2, "I;16": 2, "RGB": 3, "YCbCr": 3, "LAB": 3, "HSV": 3,
    "RGBA": 4, "RGBa": 4, "RGBX": 4, "CMYK": 4, "I": 4, "F": 4,
}  # fmt: skip


class Encoding(NamedTuple):
    """Storage of one column.

    `decode` and `encode` raise ValueError, KeyError, IndexError or TypeError on what does not fit.

    Attributes:
      size: bytes of every value; None where it varies.
    """

    size: int | None
    decode: Callable[[memoryview], Any]
    encode: Callable[[Any], bytes]


def parse(name: str) -> Encoding:
    """Returns the encoding of a name such as "str" or "ndarray:float16:4,32,32".

    Raises:
      ValueError: an unknown name, or `pkl`, which is refused.
    """
    if name == "pkl":
        raise ValueError("pkl runs code stored in the file, so it is refused: write it as json")
    if name in _SCALARS:
        dtype = _SCALARS[name]
        return Encoding(dtype.itemsize, _scalar_decoder(dtype), lambda x: dtype.type(x).tobytes())
    if name.split(":")[0] == "ndarray":
        return _array_encoding(name)
    if name not in _PLAIN:
        raise ValueError(f"unknown encoding {name!r}")
    return _PLAIN[name]


def _scalar_decoder(dtype: np.dtype) -> Callable[[memoryview], Any]:
    def decode(data: memoryview) -> Any:
        (value,) = np.frombuffer(data, dtype)
        return value

    return decode


def _array_encoding(name: str) -> Encoding:
    """Parses ndarray[:dtype[:dims]]; dtype and dims missing from it are stored with each value."""
    _, *arguments = name.split(":")
    if len(arguments) > 2 or (arguments and arguments[0] not in _SCALARS):
        raise ValueError(f"unknown encoding {name!r}")
    fixed_dtype = arguments[0] if arguments else None
    fixed_shape = tuple(map(int, arguments[1].split(","))) if len(arguments) == 2 else None
    size = None
    if fixed_shape is not None and fixed_dtype is not None:
        if min(fixed_shape) < 1:
            raise ValueError(f"encoding {name!r} has an empty axis")
        size = math.prod(fixed_shape) * _SCALARS[fixed_dtype].itemsize

    def decode(data: memoryview) -> np.ndarray:
        at, dtype, shape = 0, fixed_dtype, fixed_shape
        if dtype is None:
            dtype, at = _DTYPE_OF_CODE[data[0]], 1
        if shape is None:
            axes, width = data[at] >> 2, 1 << (data[at] & 3)
            dims = np.frombuffer(data[at + 1 : at + 1 + axes * width], f"<u{width}")
            shape, at = tuple(map(int, dims)), at + 1 + axes * width
        # reshape raises for a shape that does not fit; the shape cannot hold -1, being unsigned
        return np.frombuffer(data[at:], _SCALARS[dtype]).reshape(shape)

    def encode(value: np.ndarray) -> bytes:
        value = np.asarray(value)
        if value.size == 0 or not 1 <= value.ndim < 64:
            raise ValueError(f"an array of shape {value.shape} cannot be stored as ndarray")
        if fixed_dtype not in (None, value.dtype.name) or fixed_shape not in (None, value.shape):
            raise ValueError(f"an array {value.dtype.name}{value.shape} is not {name}")
        head = b""
        if fixed_dtype is None:
            head += bytes([_CODE_OF_DTYPE[value.dtype.name]])
        if fixed_shape is None:
            log_width = next(i for i in range(4) if max(value.shape) < 1 << (8 << i))
            head += bytes([value.ndim << 2 | log_width])
            head += np.array(value.shape, f"<u{1 << log_width}").tobytes()
        return head + value.astype(_SCALARS[value.dtype.name], copy=False).tobytes()

    return Encoding(size, decode, encode)


def _decode_pil(data: memoryview) -> Image.Image:
    width, height, mode_length = map(int, np.frombuffer(data[:12], "<u4"))
    mode, raw = str(data[12 : 12 + mode_length], "utf-8"), data[12 + mode_length :]
    if not width or not height:
        raise ValueError(f"an image of {width}x{height} pixels")
    row = (width + 7) // 8 if mode == "1" else width * _PIXEL_BYTES[mode]
    if row * height != len(raw):  # before Pillow allocates pixels that are not there
        raise ValueError(f"{width}x{height} {mode} takes {row * height} bytes, found {len(raw)}")
    return Image.frombytes(mode, (width, height), bytes(raw))


def _encode_pil(image: Image.Image) -> bytes:
    mode = image.mode.encode()
    return np.array([*image.size, len(mode)], "<u4").tobytes() + mode + image.tobytes()


def _parts(data: memoryview, at: int) -> list[memoryview]:
    """Splits data of the form: u32 count, that many u32 sizes, then the parts, up to the end."""
    (count,) = np.frombuffer(data[at : at + 4], "<u4")
    start = at + 4 + 4 * int(count)
    ends = start + np.cumsum(np.frombuffer(data[at + 4 : start], "<u4"), dtype=np.int64)
    if len(ends) != count or (ends[-1] if count else start) != len(data):
        raise ValueError(f"{count} parts do not fill {len(data)} bytes")
    starts = [start, *ends[:-1]]
    return [data[begin:end] for begin, end in zip(starts, ends, strict=False)]


def _join_parts(parts: list[bytes]) -> bytes:
    sizes = np.array([len(parts), *map(len, parts)], "<u4")
    return sizes.tobytes() + b"".join(parts)


def _list_encoding(item: Encoding) -> Encoding:
    """Returns the encoding of a list: an unused u32, then the parts."""
    return Encoding(
        None,
        lambda data: [item.decode(part) for part in _parts(data, 4)],
        lambda values: bytes(4) + _join_parts([item.encode(value) for value in values]),
    )


def _text(data: memoryview) -> str:
    return str(data, "utf-8")


def _encode_text(value: Any) -> bytes:
    return str(value).encode()


_FILE = Encoding(None, bytes, bytes)
_PIL = Encoding(None, _decode_pil, _encode_pil)
_JPEG_ARRAY = Encoding(None, lambda data: [bytes(part) for part in _parts(data, 0)], _join_parts)
_PLAIN = {
    "bytes": _FILE,
    "jpeg": _FILE,
    "png": _FILE,
    "str": Encoding(None, _text, _encode_text),
    "str_int": Encoding(None, lambda data: int(_text(data)), _encode_text),
    "str_float": Encoding(None, lambda data: float(_text(data)), _encode_text),
    "str_decimal": Encoding(None, lambda data: decimal.Decimal(_text(data)), _encode_text),
    "json": Encoding(
        None, lambda data: parse_json(_text(data)), lambda value: json.dumps(value).encode()
    ),
    "int": Encoding(
        8, lambda data: int(np.frombuffer(data, "<i8").item()), lambda x: np.int64(x).tobytes()
    ),
    "pil": _PIL,
    "jpeg_array": _JPEG_ARRAY,
    "jpegarray": _JPEG_ARRAY,
    "list[pil]": _list_encoding(_PIL),
    "list[jpeg]": _list_encoding(_FILE),
    "list[png]": _list_encoding(_FILE),
}
