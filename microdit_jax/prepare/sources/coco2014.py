"""COCO 2014: photographs with five captions each; the validation set is for evaluation."""

from pathlib import Path

from microdit_jax.prepare.sources.annotations import read_annotations
from microdit_jax.prepare.sources.pictures import ListedPictures


def open_pictures(root: Path, split: str = "val") -> ListedPictures:
    """annotations/captions_val2014.json and val2014/ below `root`; or the train ones."""

    def pictures_of(data):
        files = {image["id"]: image["file_name"] for image in data["images"]}
        for row in data["annotations"]:
            name = files[row["image_id"]]
            yield name.removesuffix(".jpg"), row["caption"], root / f"{split}2014" / name

    return read_annotations(root / "annotations" / f"captions_{split}2014.json", pictures_of)
