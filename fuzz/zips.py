"""Archives around bytes that a fuzzer chose, made in microseconds: zipfile takes a millisecond."""

import struct
import zlib
from collections.abc import Mapping


def stored_zip(members: Mapping[str, bytes]) -> bytes:
    """Returns a zip of uncompressed members, as torch.save writes one."""
    body, directory = [], []
    position = 0
    for name, data in members.items():
        key = name.encode()
        fields = struct.pack("<HHHHIII", 0, 0, 0, 33, zlib.crc32(data), len(data), len(data))
        local = b"PK\3\4\x14\0" + fields + struct.pack("<HH", len(key), 0) + key
        directory.append(
            b"PK\1\2\x14\0\x14\0"
            + fields
            + struct.pack("<HHHHHII", len(key), 0, 0, 0, 0, 0, position)
            + key
        )
        body += [local, data]
        position += len(local) + len(data)
    listed = b"".join(directory)
    count = len(members)
    end = struct.pack("<HHHHIIH", 0, 0, count, count, len(listed), position, 0)
    return b"".join(body) + listed + b"PK\5\6" + end
