"""TextCaps: photographs of Open Images with captions that read the text in them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from microdit_jax.prepare.sources.annotations import read_annotations
from microdit_jax.prepare.sources.listed_images import ListedImages


def open_images(root: Path, split: str = "train") -> ListedImages:
    """Opens TextCaps_0.1_train.json (or val) and train_images/ (of both) below `root`."""

    def captions_in(data: Any) -> Iterator[tuple[str, str, str]]:
        for row in data["data"]:
            yield row["image_id"], row["caption_str"], f"train_images/{row['image_id']}.jpg"

    return read_annotations(root / f"TextCaps_0.1_{split}.json", root, captions_in)
