"""Readers of Parquet and Arrow files of images, through the source that reads them."""

import itertools

from fuzz.scratch import Scratch
from fuzz.targets import Read, Target
from microdit_jax.errors import UserError
from microdit_jax.prepare.sources import column_process
from microdit_jax.prepare.sources.listed_images import SourceImage
from microdit_jax.prepare.sources.parquet_images import ParquetImages


def _open(scratch: Scratch) -> Read:
    column_process.ROW_SECONDS = 2

    def read(data: bytes) -> None:
        # The first bytes choose the format, whatever the name.
        source = ParquetImages(str(scratch.file("x.parquet", data)))
        for part in range(min(len(source.parts), 4)):
            source.fingerprint(part)
            for image in itertools.islice(source.read(part), 100):
                assert image.skip_reason or isinstance(image.caption, str)
                _load(image)

    return read


def _load(image: SourceImage) -> None:
    try:
        assert image.skip_reason or isinstance(image.load(), bytes)
    except (OSError, ValueError):  # no file beside the table, or one outside of its folder
        pass


WORDS = (b"PAR1", b"ARROW1\0\0", b"\xff\xff\xff\xff", b"\x15\x00\x15", b"\x19\x2c", b"ARROW:schema")
TARGETS = {"columns": Target(_open, (UserError,), WORDS)}
