"""Readers of evaluation: statistics, prompts, a detector's results; and a run's own codec."""

import itertools
from pathlib import Path

from fuzz.grammar import after_a_byte, json_document, json_lines
from fuzz.scratch import Scratch
from fuzz.targets import Read, Target
from microdit_jax.encoders.patch_pca import PatchPCA
from microdit_jax.errors import UserError
from microdit_jax.evaluate.prompts import read_prompts
from microdit_jax.metrics import geneval
from microdit_jax.metrics.statistics import load_reference

CODEC = Path(__file__).parents[2] / "microdit_jax" / "assets" / "instant" / "model" / "vae"


def _open_npz(scratch: Scratch) -> Read:
    return lambda data: load_reference(scratch.file("x.npz", data))


def _open_prompts(scratch: Scratch) -> Read:
    endings = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".results")

    def read(data: bytes) -> None:
        # The first byte chooses the format, as a file's name would.
        ending = endings[data[0] % len(endings)] if data else ".txt"
        path = scratch.file(f"x{ending}", data[1:])
        if ending == ".results":
            geneval.scores(path)
        else:
            found = read_prompts(str(path))
            assert all(isinstance(text, str) for text in itertools.islice(found.texts, 100))

    return read


def _open_codec(scratch: Scratch) -> Read:
    scratch.file("vae/codec.npz", (CODEC / "codec.npz").read_bytes())

    def read(data: bytes) -> None:
        scratch.file("vae/codec.json", data)
        PatchPCA.load(scratch.folder / "vae")

    return read


TARGETS = {
    "npz": Target(
        _open_npz,
        (UserError,),
        (b"PK\1\2", b"PK\3\4", b"\x93NUMPY\1\0", b"'shape': (", b"<f8", b"|O"),
    ),
    "prompts": Target(
        _open_prompts,
        (UserError,),
        (b"caption,", b'{"annotations":[', b'"image_id":', b'"tag":"colors"', b'"correct":true'),
        after_a_byte(json_lines),
    ),
    "codec": Target(
        _open_codec, (UserError,), (b'"patch":', b'"channels":', b'"version":1'), json_document
    ),
}
