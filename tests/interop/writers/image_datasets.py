"""Writes the eight images by every writer: python image_datasets.py FOLDER."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))
import write_image_datasets as writers  # noqa: E402

folder = Path(sys.argv[1])
writers.main()
writers.web_dataset(folder / "webdataset_packed", "tar.gz")
writers.img2dataset(folder, "files")
