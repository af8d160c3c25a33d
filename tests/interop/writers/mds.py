"""Writes an MDS dataset by mosaicml-streaming: python mds.py FOLDER COMPRESSION|none."""

import sys

from streaming import MDSWriter

columns = {"caption": "str", "latents": "bytes", "number": "int"}
compression = None if sys.argv[2] == "none" else sys.argv[2]
with MDSWriter(
    out=sys.argv[1], columns=columns, compression=compression, hashes=["xxh64"], size_limit=2000
) as out:
    for i in range(50):
        out.write({"caption": f"number {i}", "latents": bytes([i]) * 64, "number": i})
