"""SA-1B: photographs in tars, with captions that LLaVA wrote (PixArt-alpha's)."""

from pathlib import Path, PurePosixPath

from microdit_jax.errors import UserError
from microdit_jax.prepare.sources import tables
from microdit_jax.prepare.sources.archived_images import ArchivedImages, find_archives
from microdit_jax.prepare.sources.archives import MAX_TEXT
from microdit_jax.prepare.sources.listed_images import read_below


def open_images(root: Path) -> ArchivedImages:
    """Opens sa_*.tar (or folders of that name), and captions/sa_1.txt or a table captions.json[l].

    The tars' own .json files hold masks, no captions. A table has the columns file_name ("sa_1" or
    "sa_1.jpg") and caption.
    """
    candidates = [root / f"captions{suffix}" for suffix in tables.SUFFIXES]
    table = next((path for path in candidates if path.is_file()), None)
    texts: dict[str, str] = {}
    if table is not None:
        for row in tables.rows(table):
            name = str(tables.column(row, ("file_name", "image", "id"), table))
            caption = tables.text(row, ("caption", "text"), table)
            if caption is not None:
                texts[name.removesuffix(".jpg")] = caption
    elif not (root / "captions").is_dir():
        raise UserError(
            f"expected captions of SA-1B in {root}/captions, found no such folder, nor a table "
            "captions.json; unpack SA1B_caption.tar.gz there (docs/datasets.md)"
        )

    def caption_of(name: str) -> str | None:
        stem = PurePosixPath(name).stem
        if table is not None:
            return texts.get(stem)
        try:
            text = read_below(root, f"captions/{stem}.txt", MAX_TEXT)
        except (OSError, ValueError):
            return None
        return text.decode("utf-8", "replace")

    archives = find_archives(root, "sa_[0-9]*.tar", "sa_[0-9]*[0-9]")
    return ArchivedImages(archives, lambda archive: caption_of)
