"""Conceptual 12M: a table of addresses and captions, fetched by img2dataset into tar shards."""

import functools
from pathlib import Path
from typing import Any

from microdit_jax.files import parse_json
from microdit_jax.prepare.sources import tables
from microdit_jax.prepare.sources.archived_images import ArchivedImages, find_archives
from microdit_jax.prepare.sources.webdataset import caption_in_text


def open_images(root: Path) -> ArchivedImages:
    """Opens the shards in `root`.

    A caption that a shard lacks is looked up by address in cc12m.tsv (address, caption; no header).
    """
    table = root / "cc12m.tsv"

    @functools.cache
    def captions() -> dict[str, str]:
        rows = tables.rows(table, columns=("url", "caption"))
        return {row["url"]: row["caption"] for row in rows}

    in_text = caption_in_text()

    def caption_in(ending: str, data: bytes) -> Any:
        caption = in_text(ending, data)
        if caption is None and ending == ".json" and table.is_file():
            try:
                address = parse_json(data)["url"]
            except (KeyError, ValueError, TypeError):
                return None
            caption = captions().get(str(address))
        return caption

    return ArchivedImages(find_archives(root, "*.tar"), caption_in=caption_in)
