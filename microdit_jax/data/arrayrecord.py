"""Latents in ArrayRecord files as a TFDS dataset, read without TensorFlow."""

import os
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError
from tensorflow_datasets.core.decode import DeserializeMethod
from tensorflow_datasets.proto import tf_example_pb2

from microdit_jax.errors import UserError

SPLIT = "train"
# Protobuf makes the class when the module is imported, so type checkers do not see it
Example = tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue]


def open_builder(folder: str) -> Any:
    """Opens a TFDS dataset by its folder; raises whatever TFDS raises.

    Returns:
      `tfds.core.DatasetBuilder`; decorators hide its methods' arguments from type checkers.
    """
    return tfds.builder_from_directory(folder)  # pyright: ignore[reportCallIssue]


class ArrayRecordStore:
    """Random access to the stored bytes of a TFDS dataset in ArrayRecord files.

    Attributes:
      columns: name -> type and shape, for messages.
    """

    def __init__(self, folder: str | os.PathLike, split: str = SPLIT):
        """Raises UserError if TFDS finds no such dataset, or arrays not stored as raw bytes."""
        self._folder = str(folder)
        try:
            builder = open_builder(self._folder)
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
        """Returns the bytes of each column of a record; raises UserError if it is damaged."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        try:
            example = Example.FromString(self._records[index])
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
        """Names a record, for messages: "record 7 of FOLDER"."""
        return f"record {index} of {self._folder}"

    def _check_files(self, builder: tfds.core.DatasetBuilder, split: str) -> None:
        """Raises UserError for missing files, which TFDS itself notices at the first read alone."""
        for file in builder.info.splits[split].file_instructions:
            path = Path(file.filename)
            if not path.is_file() or path.stat().st_size == 0:
                raise UserError(f"expected records in {path}, found none; copy the dataset again")
