"""Conceptual 12M: a table of addresses and captions, fetched by img2dataset into tar shards."""

import functools
from pathlib import Path

from microdit_jax.files import parse_json
from microdit_jax.prepare.sources import tables
from microdit_jax.prepare.sources.webdataset import ArchivedImages, find_archives, text_or_json


def open_images(root: Path) -> ArchivedImages:
    """Opens the shards in `root`.

    A caption that a shard lacks is looked up by address in cc12m.tsv (address, caption; no header).
    """
    table = root / "cc12m.tsv"

    @functools.cache
    def captions() -> dict[str, str]:
        rows = tables.rows(table, columns=("url", "caption"))
        return {row["url"]: row["caption"] for row in rows}

    def caption_of(name: str, files: dict[str, bytes]) -> str | None:
        caption = text_or_json(name, files)
        if caption is None and table.is_file():
            try:
                address = parse_json(files[".json"])["url"]
            except (KeyError, ValueError, TypeError):
                return None
            caption = captions().get(str(address))
        return caption

    return ArchivedImages(find_archives(root, "*.tar"), lambda archive: caption_of)
