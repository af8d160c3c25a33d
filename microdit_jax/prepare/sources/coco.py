"""COCO of 2014 and of 2017: photographs with five captions each; one split is for evaluation."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from microdit_jax.prepare.sources.annotations import read_annotations
from microdit_jax.prepare.sources.listed_images import ListedImages


def open_2014(root: Path, split: str = "val") -> ListedImages:
    """Opens annotations/captions_val2014.json and val2014/ below `root`; or the train ones."""
    return _open(root, f"{split}2014")


def open_2017(root: Path, split: str = "val") -> ListedImages:
    """Opens annotations/captions_val2017.json and val2017/ below `root`; or the train ones."""
    return _open(root, f"{split}2017")


def _open(root: Path, name: str) -> ListedImages:
    def captions_in(data: Any) -> Iterator[tuple[str, str, str]]:
        files = {image["id"]: image["file_name"] for image in data["images"]}
        for row in data["annotations"]:
            file = files[row["image_id"]]
            yield file.removesuffix(".jpg"), row["caption"], f"{name}/{file}"

    return read_annotations(root / "annotations" / f"captions_{name}.json", root, captions_in)
