"""Files that say more than they hold, made without taking the space or the time themselves."""

import bz2
import io
import os
import struct
import tarfile

from PIL import Image


def sparse(path, size):
    """A file of zeros that takes no space on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)
    return path


def progressive(side, scans):
    """A JPEG whose last scan, 14 bytes long, comes again and again."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def strips(count):
    """A TIFF of 10 x count pixels, each row in a strip of its own."""

    def tag(number, kind, length, value):
        return struct.pack("<HHII", number, kind, length, value)

    offsets, sizes, tags = 18, 18 + 4 * count, 18 + 8 * count
    entries = [
        *(tag(256, 4, 1, 10), tag(257, 4, 1, count), tag(258, 3, 1, 8), tag(259, 3, 1, 1)),
        *(tag(262, 3, 1, 1), tag(273, 4, count, offsets), tag(277, 3, 1, 1), tag(278, 4, 1, 1)),
        tag(279, 4, count, sizes),
    ]
    head = struct.pack("<2sHI", b"II", 42, tags) + bytes(10)
    lists = struct.pack("<I", 8) * count + struct.pack("<I", 10) * count
    return head + lists + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


def header(name, size, kind=b"0"):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.USTAR_FORMAT)


def padded(data):
    return data + bytes(-len(data) % 512)


def large_tar(path, *members):
    """A tar of files of zeros that take no space on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for name, size, kind in members:
            file.write(header(name, size, kind))
            file.seek(size + -size % 512, os.SEEK_CUR)
        file.write(bytes(1024))


def lying_bz2():
    """A bzip2 stream of 5 GB of zeros in 5 kB: one block again and again, bit by bit."""
    data = bz2.compress(bytes(45_000_000))
    bits = f"{int.from_bytes(data, 'big'):0{8 * len(data)}b}"
    end = bits.rindex(f"{0x177245385090:048b}")
    block, crc, combined = bits[32:end], int(bits[80:112], 2), 0
    for _ in range(112):
        combined = (combined << 1 & 0xFFFFFFFF | combined >> 31) ^ crc
    bits = bits[:32] + block * 112 + bits[end : end + 48] + f"{combined:032b}"
    bits += "0" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


def stored_zip(path, members):
    """A zip with members as they are given: name, method, flags, bytes, claimed size."""
    directory, at = b"", 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for name, method, flags, data, size, crc in members:
            fields = (20, flags, method, 0, 0x21, crc, len(data), size, len(name), 0)
            at = file.tell()
            file.write(b"PK\3\4" + struct.pack("<5H3I2H", *fields) + name + data)
            fields = (20, *fields, 0, 0, 0, 0, at)
            directory += b"PK\1\2" + struct.pack("<6H3I5H2I", *fields) + name
        at, count = file.tell(), len(members)
        fields = (0, 0, count, count, len(directory), at, 0)
        file.write(directory + b"PK\5\6" + struct.pack("<4H2IH", *fields))
