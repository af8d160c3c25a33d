"""COCO 2014: photographs with five captions each; the validation set is for evaluation."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from microdit_jax.prepare.sources.annotations import read_annotations
from microdit_jax.prepare.sources.listed_images import ListedImages


def open_images(root: Path, split: str = "val") -> ListedImages:
    """Opens annotations/captions_val2014.json and val2014/ below `root`; or the train ones."""

    def captions_in(data: Any) -> Iterator[tuple[str, str, str]]:
        files = {image["id"]: image["file_name"] for image in data["images"]}
        for row in data["annotations"]:
            name = files[row["image_id"]]
            yield name.removesuffix(".jpg"), row["caption"], f"{split}2014/{name}"

    return read_annotations(root / "annotations" / f"captions_{split}2014.json", root, captions_in)
