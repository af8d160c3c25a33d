"""The same captioned images in the layout of every source, some of them of no use."""

import io
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from PIL import Image

from microdit_jax.data.stores import open_latents
from microdit_jax.prepare.mds_writer import MdsWriter
from support.source_files import write, write_json, write_tar, write_zip

PER_ARCHIVE = 100


class Captioned(NamedTuple):
    """A file that may be an image, and its caption."""

    name: str
    data: bytes
    caption: str


def jpeg(number: int, size: tuple[int, int] = (44, 32)) -> bytes:
    """Noise over a slope, in shades that depend on the number."""
    rng = np.random.default_rng(number)
    rows, columns = np.mgrid[: size[1], : size[0]][..., None] * rng.uniform(0, 4, (2, 1, 1, 3))
    pixels = np.clip(rows + columns + rng.normal(40, 20, (size[1], size[0], 3)), 0, 255)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG")
    return file.getvalue()


def captioned(good: int, bad: int, scale: int = 1) -> list[Captioned]:
    """Good ones with a bad one now and then: cut off, no image, one byte, small, without a caption.

    Args:
      scale: of the sides of the good ones, 44 x 32 pixels.
    """
    size = 44 * scale, 32 * scale
    found = [Captioned("", jpeg(i, size), f"A Picture, no. {i}") for i in range(good)]
    for i in range(bad):
        data, caption = jpeg(1000 + i, size), f"of no use, no. {i}"
        kind = i % 5
        data = [data[: len(data) // 2], b"no image", b"\0", jpeg(i, (40, 15)), data][kind]
        made = Captioned("", data, "漢字" if kind == 4 else caption)
        found.insert((i + 1) * good // (bad + 1) + i, made)
    return [one._replace(name=f"{i:05}") for i, one in enumerate(found)]


def _archives(images: list[Captioned]) -> Mapping[int, list[Captioned]]:
    starts = range(0, len(images), PER_ARCHIVE)
    return {i: images[start : start + PER_ARCHIVE] for i, start in enumerate(starts)}


def _folder(root: pathlib.Path, images: list[Captioned]) -> None:
    for one in images:
        write(root / f"{one.name}.jpg", one.data)
        write(root / f"{one.name}.txt", one.caption)


def _table(root: pathlib.Path, images: list[Captioned]) -> None:
    rows = [{"file_name": f"{one.name}.jpg", "caption": one.caption} for one in images]
    write(root / "captions.jsonl", "\n".join(json.dumps(row) for row in rows))
    for one in images:
        write(root / f"{one.name}.jpg", one.data)


def _tars(root: pathlib.Path, images: list[Captioned]) -> None:
    for i, some in _archives(images).items():
        files = {f"{one.name}.jpg": one.data for one in some}  # the captions are not adjacent
        files |= {f"{one.name}.txt": one.caption for one in some}
        write_tar(root / f"{i:05}.tar", files)


def _parquet(root: pathlib.Path, images: list[Captioned]) -> None:
    rows = [{"image": {"bytes": one.data, "path": None}, "text": one.caption} for one in images]
    root.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), root / "train-00000.parquet", row_group_size=50)


def _mds(root: pathlib.Path, images: list[Captioned]) -> None:
    with MdsWriter(root, {"jpg": "bytes", "caption": "str"}, size_limit=100_000) as writer:
        for one in images:
            writer.write({"jpg": one.data, "caption": one.caption})


def _tfds(root: pathlib.Path, images: list[Captioned]) -> None:
    class Carried(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        __module__ = "carriers"  # of a package, TFDS wants importlib_resources besides

        def _info(self):
            features = {"image": tfds.features.Image(), "caption": tfds.features.Text()}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for one in images:
                yield one.name, {"image": io.BytesIO(one.data), "caption": one.caption}

    Carried(data_dir=str(root), file_format="array_record").download_and_prepare()


def _cc12m(root: pathlib.Path, images: list[Captioned]) -> None:
    lines = [f"http://of/{one.name}\t{one.caption}" for one in images]
    write(root / "cc12m.tsv", "\n".join(lines))
    for i, some in _archives(images).items():
        files = {}
        for one in some:
            files[f"{one.name}.jpg"] = one.data
            files[f"{one.name}.json"] = json.dumps({"url": f"http://of/{one.name}"})
        write_tar(root / f"{i:05}.tar", files)


def _sa1b(root: pathlib.Path, images: list[Captioned]) -> None:
    for i, some in _archives(images).items():
        write_tar(root / f"sa_{i:06}.tar", {f"sa_{one.name}.jpg": one.data for one in some})
    for one in images:
        write(root / f"captions/sa_{one.name}.txt", one.caption)


def _journeydb(root: pathlib.Path, images: list[Captioned]) -> None:
    folder, rows = root / "data/train", []
    for i, some in _archives(images).items():
        files = {f"{i:03}/{one.name}.jpg": one.data for one in some}
        write_tar(folder / f"imgs/{i:03}.tgz", files, "w:gz")
        rows += [{"img_path": f"./{i:03}/{o.name}.jpg", "prompt": o.caption} for o in some]
    table = folder / "train_anno_realease_repath.jsonl"
    write(table, "\n".join(json.dumps(row) for row in rows))


def _diffusiondb(root: pathlib.Path, images: list[Captioned]) -> None:
    for i, some in _archives(images).items():
        prompts = {f"{one.name}.png": {"p": one.caption} for one in some}
        files = {f"{one.name}.png": one.data for one in some}
        files[f"part-{i + 1:06}.json"] = json.dumps(prompts)
        write_zip(root / f"part-{i + 1:06}.zip", files)
    scores = [{"image_name": f"{o.name}.png", "image_nsfw": 0.1, "prompt_nsfw": 0} for o in images]
    pq.write_table(pa.Table.from_pylist(scores), root / "metadata-large.parquet")


def _textcaps(root: pathlib.Path, images: list[Captioned]) -> None:
    rows = [{"image_id": one.name, "caption_str": one.caption} for one in images]
    write_json(root / "TextCaps_0.1_train.json", {"data": rows})
    for one in images:
        write(root / f"train_images/{one.name}.jpg", one.data)


def _coco(year: int) -> Callable[[pathlib.Path, list[Captioned]], None]:
    def make(root: pathlib.Path, images: list[Captioned]) -> None:
        files = [{"id": i, "file_name": f"{one.name}.jpg"} for i, one in enumerate(images)]
        captions = [{"image_id": i, "caption": one.caption} for i, one in enumerate(images)]
        found = {"images": files, "annotations": captions}
        write_json(root / f"annotations/captions_val{year}.json", found)
        for one in images:
            write(root / f"val{year}/{one.name}.jpg", one.data)

    return make


# Name of a folder -> --source, and what writes it.
CARRIERS = {
    "folder": ("folder", _folder),
    "table": ("folder", _table),
    "webdataset": ("webdataset", _tars),
    "parquet": ("parquet", _parquet),
    "mds": ("mds", _mds),
    "tfds": ("tfds", _tfds),
    "cc12m": ("cc12m", _cc12m),
    "sa1b": ("sa1b", _sa1b),
    "journeydb": ("journeydb", _journeydb),
    "diffusiondb": ("diffusiondb", _diffusiondb),
    "textcaps": ("textcaps", _textcaps),
    "coco2014": ("coco2014", _coco(2014)),
    "coco2017": ("coco2017", _coco(2017)),
}


def write_carriers(root: pathlib.Path, images: list[Captioned]) -> dict[str, tuple[str, str]]:
    """Writes all of them; returns by name the --source and the --input."""
    found = {}
    for name, (source, make) in CARRIERS.items():
        make(root / name, images)
        folder = root / name
        if name == "tfds":
            (info,) = folder.rglob("dataset_info.json")
            folder = info.parent
        found[name] = (source, str(folder))
    return found


def outcome(output: pathlib.Path, *resolutions: int) -> dict[str, object]:
    """Counts and reasons of a job, and the bytes of latents and caption by the caption."""
    report = json.loads((output / "report.json").read_text())
    found: dict[str, object] = {key: report[key] for key in ("records", "skipped", "reasons")}
    for resolution in resolutions:
        for record in open_latents(output, resolution=resolution):
            caption, latents = record["caption"], record["latents"].tobytes()
            found[f"{resolution} {caption}"] = latents, record["caption_latents"].tobytes()
    return found
