"""Latents in ArrayRecord files as a TFDS dataset, read without TensorFlow."""

import os
from collections.abc import Sequence

from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from microdit_jax.data.tfds_folder import open_records, read_features
from microdit_jax.errors import UserError, visible

SPLIT = "train"
# Protobuf makes the class when the module is imported, so type checkers do not see it
Example = tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue]


class ArrayRecordStore:
    """Random access to the stored bytes of a TFDS dataset in ArrayRecord files.

    Attributes:
      columns: name -> type and shape, for messages.
    """

    way = ""  # always local

    def __init__(self, folder: str | os.PathLike, split: str = SPLIT):
        """Raises UserError if there is no such dataset, or arrays are not stored as raw bytes."""
        self._folder = str(folder)
        self._records = open_records(folder, split)
        self.columns = {}
        for name, feature in read_features(folder).items():
            self.columns[name] = f"{feature.dtype or feature.kind} {feature.shape}"
            if feature.shape and feature.encoding != "bytes":
                raise UserError(
                    f"expected arrays as raw bytes in {visible(folder)}, found {visible(name)} "
                    "encoded otherwise; write it with tfds.features.Encoding.BYTES"
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
                f"expected a record in {self.where(index)}, could not read it "
                f"({visible(error)}); copy the dataset again"
            ) from error

    def raws(self, indices: Sequence[int]) -> list[dict[str, bytes]]:
        """Returns what `raw` does for each."""
        return [self.raw(index) for index in indices]

    def where(self, index: int) -> str:
        """Names a record, for messages: "record 7 of FOLDER"."""
        return f"record {index} of {self._folder}"
