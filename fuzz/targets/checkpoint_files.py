"""Readers of checkpoints: .pt, its format before PyTorch 1.6, .safetensors, and .distcp."""

import numpy as np

from fuzz.grammar import pickles, safetensors
from fuzz.scratch import Scratch
from fuzz.seeds.checkpoint_files import DISTRIBUTED
from fuzz.targets import Read, Target
from fuzz.zips import stored_zip
from microdit_jax.convert.formats.safetensors_file import read_safetensors
from microdit_jax.convert.formats.torch_file import read_torch
from microdit_jax.convert.state_dict import read_state_dict
from microdit_jax.errors import UserError

STORAGES = {"a/data/0": bytes(range(64)), "a/data/1": b"\1\0\0\0\0\0\0\0", "a/data/s": b"d"}
OPCODES = tuple(
    bytes([code])
    for code in b"(.0123BCFGIJKLMNPQRSTUVXabcdeghijlopqrstu)]}\x80\x81\x85"
    + b"\x86\x87\x88\x89\x8a\x8c\x8f\x90\x91\x92\x93\x94"  # protocols 2 and 4
)
NAMES = (
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"ctorch._utils\n_rebuild_tensor_v3\n",
    b"ctorch._tensor\n_rebuild_from_type_v2\n",
    b"ctorch.storage\nUntypedStorage\n",
    b"ctorch\nSize\n",
    b"ccollections\ndefaultdict\n",
    b"c_codecs\nencode\n",
    b"ctorch\nFloatStorage\n",
    b"ctorch\nBFloat16Storage\n",
    b"ctorch\nbfloat16\n",
    b"ccollections\nOrderedDict\n)R",
    b"X\7\0\0\0storage",
    b"X\1\0\0\x000",
    b"X\3\0\0\0cpu",
    b"K\x08tQK\0K\x02K\x04\x86K\x04K\1\x86\x89}tR",
    b"\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"J\xff\xff\xff\x7f",
    b"\x95\xff\xff\xff\xff\0\0\0\0",
    b"r\xff\xff\xff\x7f",
)


CLASSES = (
    b"\x8c\x0cMetadataIndex\x94\x93",
    b"\x8c\x14ChunkStorageMetadata\x94\x93",
    b"\x8c\x0c_StorageInfo\x94\x93",
    b"\x8c\x07offsets",
    b"\x8c\x05sizes",
    b"\x8c\x06offset",
    b"\x8c\x06length",
    b"\x8c\x0drelative_path",
    b"\x8c\x0c__0_0.distcp",
    b"\x8c\x0c../../passwd",
)


def touch(found: object, most: int = 100_000) -> None:
    """Reads the first and last elements of every array, and small ones whole.

    An array that reaches past its file's mapping ends the process here.
    """
    waiting, seen = [found], 0
    while waiting and seen < most:
        value, seen = waiting.pop(), seen + 1
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += list(value)
        elif isinstance(value, np.ndarray) and value.size:
            assert value.dtype.kind != "O", f"an array of Python objects, {value.shape}"
            corners = [value[(0,) * value.ndim], value[(-1,) * value.ndim]]
            if value.size <= 10_000:
                corners.append(np.array(value))


def _open_pt(scratch: Scratch) -> Read:
    def read(data: bytes) -> None:
        # A pickle alone gets an archive around it: its mutations need no checksums.
        whole = data[:2] == b"PK" or len(data) < 2
        data = data if whole else stored_zip({"a/data.pkl": data} | STORAGES)
        touch(read_torch(scratch.file("x.pt", data)))

    return read


def _open_legacy(scratch: Scratch) -> Read:
    return lambda data: touch(read_torch(scratch.file("x.pt", data)))


def _open_safetensors(scratch: Scratch) -> Read:
    def read(data: bytes) -> None:
        tensors, metadata = read_safetensors(scratch.file("x.safetensors", data))
        touch(tensors)
        touch(dict(metadata))

    return read


def _open_distributed(scratch: Scratch) -> Read:
    """The metadata is under test; the chunks that it names are torch's own."""
    for name in ("__0_0.distcp", "__1_0.distcp"):
        scratch.file(f"d/{name}", (DISTRIBUTED / name).read_bytes())

    def read(data: bytes) -> None:
        touch(read_state_dict(scratch.file("d/.metadata", data), weights="state.model").tensors)

    return read


TARGETS = {
    "pt": Target(_open_pt, (UserError, OSError), OPCODES + NAMES, pickles),
    "legacy_pt": Target(_open_legacy, (UserError, OSError), OPCODES + NAMES, pickles),
    "safetensors": Target(
        _open_safetensors,
        (UserError, OSError),
        (b'"dtype":"F32"', b'"shape":[', b'"data_offsets":[0,', b"BF16", b"__metadata__", b"-1"),
        safetensors,
    ),
    "distributed": Target(_open_distributed, (UserError, OSError), OPCODES + CLASSES, pickles),
}
