"""Writes tests/golden/image_datasets with the real writers, to be run by hand where they are.

  python -m venv venv && venv/bin/pip install datasets webdataset img2dataset
  venv/bin/python tests/support/write_image_datasets.py tests/golden/image_datasets

Every dataset has the same eight images, of 24 x 16 pixels in shades of red, with a caption each.
img2dataset fetches from a server on this machine; its ninth address does not exist.
"""

import functools
import http.server
import io
import shutil
import subprocess
import sys
import threading
from pathlib import Path

from PIL import Image

COUNT = 8


def image(number: int, format: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (24, 16), (10 * number, 0, 0)).save(file, format)
    return file.getvalue()


def caption(number: int) -> str:
    return f"number {number}"


def hugging_face(folder: Path) -> None:
    """A folder of save_to_disk, and one split of the hub's parquet files."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {
        "image": [{"bytes": image(i, "PNG"), "path": f"{i}.png"} for i in range(COUNT)],
        "text": [caption(i) for i in range(COUNT)],
    }
    dataset = datasets.Dataset.from_dict(rows, features=features)
    splits = datasets.DatasetDict(
        {"train": dataset.select(range(6)), "test": dataset.select(range(6, COUNT))}
    )
    splits.save_to_disk(str(folder / "hf_disk"))
    (folder / "hf_parquet/data").mkdir(parents=True)
    dataset.to_parquet(str(folder / "hf_parquet/data/train-00000-of-00001.parquet"), batch_size=3)


def web_dataset(folder: Path, ending: str = "tar") -> None:
    """Shards of the webdataset library, in a folder of their own."""
    import webdataset

    folder.mkdir(parents=True)
    with webdataset.ShardWriter(f"{folder}/%05d.{ending}", maxcount=5) as writer:
        for i in range(COUNT):
            name = f"folder{i % 2}/shot_{i}"
            writer.write({"__key__": name, "image.jpg": image(i), "json": {"prompt": caption(i)}})


def img2dataset(folder: Path, format: str) -> None:
    """Output of img2dataset, from a server on this machine."""
    files = folder / "served"
    files.mkdir()
    for i in range(COUNT):
        (files / f"{i}.jpg").write_bytes(image(i))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(files))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    lines = ["url\tcaption"]
    port = server.server_address[1]
    lines += [f"http://127.0.0.1:{port}/{i}.jpg\t{caption(i)}" for i in range(COUNT + 1)]
    table = folder / "urls.tsv"
    table.write_text("\n".join(lines))
    subprocess.run(
        [
            Path(sys.executable).with_name("img2dataset"), f"--url_list={table}",
            "--input_format=tsv", "--url_col=url", "--caption_col=caption",
            f"--output_format={format}", f"--output_folder={folder}/img2dataset_{format}",
            "--processes_count=1", "--thread_count=1", "--resize_mode=no", "--retries=0",
            "--number_sample_per_shard=5",
        ],
        check=True,
    )  # fmt: skip
    server.shutdown()
    shutil.rmtree(files)
    table.unlink()


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    hugging_face(folder)
    web_dataset(folder / "webdataset")
    for format in ("parquet", "webdataset"):
        img2dataset(folder, format)


if __name__ == "__main__":
    main()
