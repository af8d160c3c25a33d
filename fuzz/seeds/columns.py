"""Inputs for the reader of Parquet and Arrow files: types, encodings and codecs of real writers."""

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

IMAGE = b"\x89PNG\r\n\x1a\n"
HUGGING_FACE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _table(image: pa.DataType, caption: pa.DataType, images: list[Any], captions: list[Any]):
    return pa.table({"image": pa.array(images, image), "caption": pa.array(captions, caption)})


def _parquet(table: pa.Table, **options: Any) -> bytes:
    file = io.BytesIO()
    every: dict[str, Any] = {"compression": "none"} | options
    pq.write_table(table, file, **every)
    return file.getvalue()


def _arrow(table: pa.Table, *, is_file: bool, **options: Any) -> bytes:
    file = io.BytesIO()
    new = pa.ipc.new_file if is_file else pa.ipc.new_stream
    with new(file, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=2)
    return file.getvalue()


def columns() -> dict[str, bytes]:
    """Returns inputs of the target `columns`, by name."""
    plain = _table(pa.binary(), pa.string(), [IMAGE, b"", None], ["a", None, "\u00e9"])
    structs = _table(
        HUGGING_FACE,
        pa.string(),
        [{"bytes": IMAGE, "path": "a.png"}, {"bytes": None, "path": "../a"}, None],
        ["a", "b", "c"],
    )
    lists = _table(pa.large_binary(), pa.list_(pa.string()), [IMAGE] * 2, [["a", "b"], []])
    words = _table(
        pa.binary(), pa.dictionary(pa.int8(), pa.string()), [IMAGE] * 4, ["a", "b", "a", None]
    )
    status = plain.append_column("status", pa.array(["success", "failed", None]))
    return {
        "plain.parquet": _parquet(plain),
        "snappy_dictionary.parquet": _parquet(words, compression="snappy"),
        "zstd_checksums.parquet": _parquet(
            plain, compression="zstd", write_page_checksum=True, data_page_version="2.0"
        ),
        "structs_in_groups.parquet": _parquet(structs, row_group_size=1),
        "lists_gzip.parquet": _parquet(lists, compression="gzip", use_dictionary=False),
        "status_delta.parquet": _parquet(
            status,
            use_dictionary=False,
            column_encoding={"caption": "DELTA_BYTE_ARRAY", "status": "DELTA_LENGTH_BYTE_ARRAY"},
        ),
        "no_rows.parquet": _parquet(plain.slice(0, 0)),
        "only_magic.parquet": b"PAR1\xff\xff\xff\x7fPAR1",
        "stream.arrow": _arrow(structs, is_file=False),
        "lists_zstd.arrow": _arrow(lists, is_file=False, compression="zstd"),
        "dictionary_file.arrow": _arrow(words, is_file=True),
        "lz4_file.arrow": _arrow(plain, is_file=True, compression="lz4"),
    }


MAKERS = {"columns": columns}
