"""TFDS datasets by their description alone: what a folder's files name is never imported or run.

`tfds.builder_from_directory` imports every module that features.json names, and so runs a
stranger's code. Here the two JSON files are read as data: the features as a table of columns, the
splits as files below the folder. Nothing of tensorflow_datasets is built from what they say but the
list of files.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath
from google.protobuf import json_format
from tensorflow_datasets.core import naming, splits
from tensorflow_datasets.core.proto import dataset_info_pb2

from microdit_jax.errors import UserError, visible
from microdit_jax.files import inside, parse_json, read_bytes, read_json
from microdit_jax.machine import open_files

# Protobuf makes the class when the module is imported, so type checkers do not see it
_DatasetInfo = dataset_info_pb2.DatasetInfo  # pyright: ignore[reportAttributeAccessIssue]
INFO, FEATURES = "dataset_info.json", "features.json"
_MAX_JSON = 64 << 20  # bytes; the index of 100,000 shards takes 1 MB
_MAX_RECORDS = 10**9  # of one file
_MAX_DEPTH = 16
_MODULE = "tensorflow_datasets.core.features."
_KINDS = {
    f"{_MODULE}{name}"
    for name in (
        *("audio_feature.Audio", "bounding_boxes.BBoxFeature", "class_label_feature.ClassLabel"),
        *("dataset_feature.Dataset", "feature.Tensor", "features_dict.FeaturesDict"),
        *("image_feature.Image", "labeled_image.LabeledImage", "scalar.Scalar"),
        *("sequence_feature.Sequence", "tensor_feature.Tensor", "text_feature.Text"),
        *("translation_feature.Translation", "video_feature.Video"),
        "translation_feature.TranslationVariableLanguages",
    )
}
_CONTENTS = (
    *("audio", "boundingBox", "classLabel", "featuresDict", "image", "sequence", "tensor", "text"),
    *("translation", "video"),
)


class Feature(NamedTuple):
    """A feature of a TFDS dataset, as features.json describes it.

    Attributes:
      kind: the name of its class, such as "Text" or "Image".
      dtype: "" where the description has none.
      shape: -1 for an axis of any length.
      encoding: "bytes" for tensors that are stored so, "zlib", else "none".
      children: features of a FeaturesDict or Sequence, by name ("" for a Sequence of one).
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    encoding: str
    children: dict[str, "Feature"]


def read_features(folder: str | os.PathLike) -> dict[str, Feature]:
    """Reads features.json, in the form of TFDS 4.6 and later or the older one.

    Raises:
      UserError: it is missing or damaged, or names a class that is none of tensorflow_datasets'
        own features.
    """
    path = Path(folder) / FEATURES
    try:
        return _feature(read_json(path, _MAX_JSON), path, _MAX_DEPTH).children
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"expected the features of a TFDS dataset in {visible(path)}, found damage "
            f"({visible(repr(error), 100)}); copy it again"
        ) from error


def _feature(node: Any, path: Path, depth: int) -> Feature:
    if not depth:
        raise ValueError("nested too deep")
    name = node.get("pythonClassName", node.get("type"))
    if name not in _KINDS:
        raise UserError(
            f"expected tensorflow_datasets' own features in {visible(path)}, found "
            f"{visible(repr(name), 100)}, whose code would have to be run; write the dataset with "
            "features of tensorflow_datasets alone"
        )
    kind, content = name.rpartition(".")[2], _content(node)
    children: dict[str, Feature] = {}
    if kind == "FeaturesDict":
        is_oldest = "type" in node and not node.get("proto_cls")
        named = content if is_oldest else content.get("features", {})
        children = {key: _feature(child, path, depth - 1) for key, child in named.items()}
    elif kind in ("Sequence", "Dataset"):
        children = {"": _feature(content["feature"], path, depth - 1)}
    shape = content.get("shape") or ()
    dimensions = shape.get("dimensions", ()) if isinstance(shape, dict) else shape
    return Feature(
        kind,
        str(content.get("dtype") or ""),
        tuple(-1 if size is None else int(size) for size in dimensions),
        str(content.get("encoding") or "none"),
        children,
    )


def _content(node: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of a feature's description that depends on its class."""
    if "type" in node:  # before TFDS 4.6
        content = node["content"]
        return parse_json(content) if isinstance(content, str) else content
    if "jsonFeature" in node:
        return parse_json(node["jsonFeature"]["json"])
    return next((node[key] for key in _CONTENTS if key in node), {})


def open_records(folder: str | os.PathLike, split: str) -> ArrayRecordDataSource:
    """Opens the stored records of a split, such as "train" or "train[:10%]".

    Raises:
      UserError: no such dataset or split, files that are missing or outside of the folder, or
        another file format than ArrayRecord.
    """
    try:
        files = _files(Path(folder), split)
    except UserError:
        raise
    except Exception as error:  # TFDS and protobuf have no error classes of their own
        raise UserError(
            f"expected a TFDS dataset with a split {split!r} in ArrayRecord files in "
            f"{visible(folder)}, could not open it ({visible(error, 200)}); copy it again, or "
            "prepare it with file_format=array_record"
        ) from error
    # Its reader keeps every file open that was read once.
    open_files.check_room(len(files), f"the dataset {visible(folder)}")
    return ArrayRecordDataSource(files)


def _files(folder: Path, split: str) -> list[Any]:
    described = parse_json(read_bytes(folder / INFO, _MAX_JSON))
    described.pop("features", None)  # they stand in features.json, and are not needed here
    info = json_format.ParseDict(described, _DatasetInfo(), ignore_unknown_fields=True)
    if info.file_format != "array_record":
        raise ValueError(f"files of the format {info.file_format or 'tfrecord'}")
    template = naming.ShardedFileTemplate(
        dataset_name=info.name, data_dir=epath.Path(folder), filetype_suffix=info.file_format
    )
    files = splits.SplitDict.from_proto(info.splits, template)[split].file_instructions
    for file in files:
        path = inside(folder, os.path.relpath(file.filename, folder))
        size = path.stat().st_size if path.is_file() else 0
        if not size:
            raise UserError(
                f"expected records in {visible(path)}, found none; copy the dataset again"
            )
        if not 0 <= file.examples_in_shard <= min(size, _MAX_RECORDS):
            raise ValueError(f"{file.examples_in_shard:,} records in {size:,} bytes")
    return files
