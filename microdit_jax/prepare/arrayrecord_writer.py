"""Writes latents as a TFDS dataset in ArrayRecord files, without TensorFlow."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from microdit_jax.data.arrayrecord import SPLIT, Example
from microdit_jax.data.records import SIDECAR, LatentInfo
from microdit_jax.data.stores import ARRAY_RECORD
from microdit_jax.files import atomic_path, disk_errors, write_text

NAME = "latents"
# One record a group, so that a random read decodes no neighbours; float16 noise compresses badly.
_OPTIONS = "group_size:1,uncompressed"


def features(info: LatentInfo) -> tfds.features.FeaturesDict:
    """Describes the columns to TFDS; arrays are stored as raw bytes (`Encoding.BYTES`)."""
    texts: dict[str, Any] = {"caption": tfds.features.Text(), "id": tfds.features.Text()}
    return tfds.features.FeaturesDict(
        texts
        | {
            name: tfds.features.Tensor(
                shape=column.shape,
                dtype=np.dtype(column.dtype).newbyteorder("=").type,
                encoding=tfds.features.Encoding.BYTES,
            )
            for name, column in info.arrays.items()
        }
    )


def shard_path(folder: Path, number: int, count: int) -> Path:
    """Returns the path of a shard, named as TFDS names it."""
    return folder / f"{NAME}-{SPLIT}.array_record-{number:05}-of-{count:05}"


def write_shard(path: Path, samples: Iterable[Mapping[str, bytes]]) -> None:
    """Writes a shard of samples, given as the bytes of each column; whole or not at all."""
    with atomic_path(path) as partial:
        writer = ArrayRecordWriter(str(partial), _OPTIONS)
        try:
            for sample in samples:
                example = Example()
                for name, value in sample.items():
                    example.features.feature[name].bytes_list.value.append(value)
                writer.write(example.SerializeToString(deterministic=True))
        finally:
            writer.close()


def write_metadata(folder: Path, info: LatentInfo, shard_lengths: list[int]) -> None:
    """Makes a TFDS dataset of finished shards: writes its description, and our sidecar.

    Args:
      shard_lengths: records of each shard.
    """
    template = tfds.core.ShardedFileTemplate(
        data_dir=tfds.core.Path(folder),
        dataset_name=NAME,
        split=SPLIT,
        filetype_suffix="array_record",
    )
    count = len(shard_lengths)
    split = tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=shard_lengths,
        num_bytes=sum(shard_path(folder, i, count).stat().st_size for i in range(count)),
        filename_template=template,
    )
    write_text(folder / SIDECAR, info.to_json())
    with disk_errors(folder / ARRAY_RECORD):
        tfds.folder_dataset.write_metadata(
            data_dir=folder, features=features(info), split_infos=[split], check_data=False
        )
