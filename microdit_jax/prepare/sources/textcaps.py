"""TextCaps: photographs of Open Images with captions that read the text in them."""

from pathlib import Path

from microdit_jax.prepare.sources.annotations import read_annotations
from microdit_jax.prepare.sources.pictures import ListedPictures


def open_pictures(root: Path, split: str = "train") -> ListedPictures:
    """TextCaps_0.1_train.json (or val) and train_images/ (of both) below `root`."""

    def pictures_of(data):
        for row in data["data"]:
            file = root / "train_images" / f"{row['image_id']}.jpg"
            yield row["image_id"], row["caption_str"], file

    return read_annotations(root / f"TextCaps_0.1_{split}.json", pictures_of)
