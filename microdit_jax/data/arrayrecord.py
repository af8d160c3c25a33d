"""Latents in ArrayRecord files as a TFDS dataset, written and read without TensorFlow."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from google.protobuf.message import DecodeError
from tensorflow_datasets.core.decode import DeserializeMethod
from tensorflow_datasets.proto import tf_example_pb2

from microdit_jax.data.records import SIDECAR, LatentInfo
from microdit_jax.errors import UserError
from microdit_jax.files import atomic_path, disk_errors

NAME, SPLIT, METADATA = "latents", "train", "dataset_info.json"
# One record a group, so that a random read takes no neighbours along; float16 noise packs badly.
_OPTIONS = "group_size:1,uncompressed"


class ArrayRecordStore:
    """Random access to the stored bytes of a TFDS dataset in ArrayRecord files.

    Attributes:
      columns: name -> type and shape, for people.
    """

    def __init__(self, folder: str | os.PathLike, split: str = SPLIT):
        """Raises UserError where TFDS finds no such dataset, or arrays not kept as raw bytes."""
        self._folder = str(folder)
        try:
            builder = tfds.builder_from_directory(self._folder)
            self._check_files(builder, split)
            self._records = builder.as_data_source(
                split, deserialize_method=DeserializeMethod.RAW_BYTES
            )
        except UserError:
            raise
        except Exception as error:  # TFDS has no error class of its own
            raise UserError(
                f"expected a TFDS dataset with a split {split!r} in ArrayRecord files in {folder}, "
                f"could not open it ({error}); copy it again"
            ) from error
        self.columns = {}
        for name, feature in builder.info.features.items():
            self.columns[name] = f"{feature.np_dtype} {feature.shape}"
            as_bytes = getattr(feature, "_encoding", None) == tfds.features.Encoding.BYTES
            if feature.shape and not as_bytes:
                raise UserError(
                    f"expected arrays as raw bytes in {folder}, found {name} encoded otherwise; "
                    "write it with tfds.features.Encoding.BYTES"
                )

    def __len__(self) -> int:
        return len(self._records)

    def raw(self, index: int) -> dict[str, bytes]:
        """The bytes of each column of a record; raises UserError where it is damaged."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        try:
            example = tf_example_pb2.Example.FromString(self._records[index])
            return {
                name: feature.bytes_list.value[0]
                for name, feature in example.features.feature.items()
            }
        except (RuntimeError, ValueError, IndexError, OSError, DecodeError) as error:
            raise UserError(
                f"expected a record in {self.where(index)}, could not read it ({error}); copy the "
                "dataset again"
            ) from error

    def where(self, index: int) -> str:
        """ "record 7 of FOLDER", for messages."""
        return f"record {index} of {self._folder}"

    def _check_files(self, builder: Any, split: str) -> None:
        """Missing files are named here; TFDS notices them at the first read alone."""
        for file in builder.info.splits[split].file_instructions:
            path = Path(file.filename)
            if not path.is_file() or path.stat().st_size == 0:
                raise UserError(f"expected records in {path}, found none; copy the dataset again")


def features(info: LatentInfo) -> tfds.features.FeaturesDict:
    """The TFDS features of a dataset; arrays are kept as raw bytes (`Encoding.BYTES`)."""

    def tensor(shape: tuple[int, ...], dtype: str) -> tfds.features.Tensor:
        return tfds.features.Tensor(
            shape=shape, dtype=np.dtype(dtype).type, encoding=tfds.features.Encoding.BYTES
        )

    columns = {"caption": tfds.features.Text(), "id": tfds.features.Text()}
    for side, shape in info.latents.items():
        columns[f"latents_{side}"] = tensor(shape, "float16")
    if info.captions is not None:
        columns["caption_latents"] = tensor(info.captions, "float16")
    if info.tokens is not None:
        columns["caption_tokens"] = tensor((info.tokens,), "int32")
    return tfds.features.FeaturesDict(columns)


def shard_path(folder: Path, number: int, count: int) -> Path:
    """The file of a shard, named as TFDS names it."""
    return folder / f"{NAME}-{SPLIT}.array_record-{number:05}-of-{count:05}"


def write_shard(path: Path, samples: Iterable[Mapping[str, bytes]]) -> None:
    """Writes a shard of samples, the bytes of each column; whole or not at all."""
    with atomic_path(path) as partial:
        writer = ArrayRecordWriter(str(partial), _OPTIONS)
        try:
            for sample in samples:
                example = tf_example_pb2.Example()
                for name, value in sample.items():
                    example.features.feature[name].bytes_list.value.append(value)
                writer.write(example.SerializeToString(deterministic=True))
        finally:
            writer.close()


def write_metadata(folder: Path, info: LatentInfo, shard_lengths: list[int]) -> None:
    """Makes a TFDS dataset of finished shards: its description, and our sidecar.

    Args:
      shard_lengths: records of each shard.
    """
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=NAME, split=SPLIT, filetype_suffix="array_record"
    )
    count = len(shard_lengths)
    split = tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=shard_lengths,
        num_bytes=sum(shard_path(folder, i, count).stat().st_size for i in range(count)),
        filename_template=template,
    )
    with disk_errors(folder / METADATA):
        (folder / SIDECAR).write_text(info.to_json())
        tfds.folder_dataset.write_metadata(
            data_dir=folder, features=features(info), split_infos=[split], check_data=False
        )
