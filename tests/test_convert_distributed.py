"""Folders of torch.distributed.checkpoint: the chunks of each tensor, found good or refused."""

import pickle
import shutil

import numpy as np
import pytest
from conftest import GOLDEN
from support.convert_command import fails

from microdit_jax.convert.formats.distributed import (
    DistributedCheckpoint,
    _check_tiling,
    _Chunk,
    is_distributed,
)
from microdit_jax.convert.formats.pickle_tokens import PickleFault
from microdit_jax.convert.inputs import describe_source, find_input, holds_weights, read_tensors
from microdit_jax.convert.kinds import get_kind
from microdit_jax.convert.state_dict import read_state_dict
from microdit_jax.errors import UserError

FOLDER = GOLDEN / "torch_files" / "distcp"
A = np.arange(15, dtype=np.float32).reshape(5, 3)


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FOLDER, tmp_path / "distcp")


def test_the_chunks_of_two_processes():
    """Rows, columns, a replicated tensor, a strided and a single one; the optimiser stays."""
    found = read_tensors(find_input(FOLDER, get_kind("dit")).files, None)
    expected = {"a": A, "b": A.T, "c": A[0], "plain": A[:, 1], "scalar": np.float32(7)}
    assert set(found.tensors) == set(expected)
    for name, tensor in found.tensors.items():
        np.testing.assert_array_equal(tensor.astype(np.float32), expected[name])
    assert found.tensors["b"].dtype.name == "bfloat16"
    assert any("state.model (raw weights, 5 tensors" in note for note in found.notes)
    moments = read_state_dict(FOLDER / ".metadata", weights="state.optimizers").tensors
    np.testing.assert_array_equal(list(moments.values()), [A])


@pytest.mark.parametrize("given", ["", ".metadata", "__1_0.distcp"])
def test_any_of_its_files_names_it(given):
    files = find_input(FOLDER / given, get_kind("dit")).files
    assert [file.name for file in files] == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    assert describe_source(files)["bytes"] == sum(file.stat().st_size for file in files)
    assert is_distributed(FOLDER) and holds_weights(FOLDER)


def test_flipped_bytes_are_errors_or_equal_values(folder):
    """A hundred of them in all files: never other values, never another exception."""
    whole = {name: t.tobytes() for name, t in read_state_dict(FOLDER / ".metadata").tensors.items()}
    for name, step in ((".metadata", 61), ("__0_0.distcp", 307), ("__1_0.distcp", 307)):
        good = (FOLDER / name).read_bytes()
        for position in range(3, len(good), step):
            flipped = good[position] ^ (1 << position % 8)
            (folder / name).write_bytes(good[:position] + bytes([flipped]) + good[position + 1 :])
            try:
                found = read_state_dict(folder / ".metadata").tensors
            except UserError as error:
                assert str(error).isprintable()
                continue
            same = [whole.get(key) == tensor.tobytes() for key, tensor in found.items()]
            assert all(same) or name == ".metadata", (name, position)
        (folder / name).write_bytes(good)


def test_missing_and_truncated_files(folder, capsys, tmp_path):
    data = folder / "__1_0.distcp"
    good = data.read_bytes()
    data.write_bytes(good[:-100])
    assert "beyond the end of __1_0.distcp" in fails(
        capsys, f"--input={folder}", f"--output={tmp_path / 'm'}"
    )
    data.unlink()
    with pytest.raises(UserError, match="found nothing"):
        DistributedCheckpoint(folder)


def test_what_is_not_read_names_the_command_that_converts(folder):
    data = folder / "__0_0.distcp"
    data.write_bytes(data.read_bytes().replace(b"PK\3\4", b"PX\3\4"))
    with pytest.raises(UserError, match="dcp_to_torch FOLDER FILE.pt"):
        read_state_dict(folder / ".metadata")


def test_metadata_that_wants_to_run_code(folder):
    class Harm:
        def __reduce__(self):
            return print, ("harm",)

    (folder / ".metadata").write_bytes(pickle.dumps({"a": Harm()}))
    with pytest.raises(UserError, match="wants to run code, builtins.print"):
        DistributedCheckpoint(folder)
    (folder / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match="no Metadata"):
        DistributedCheckpoint(folder)
    name = b"__0_0.distcp"
    outside = (FOLDER / ".metadata").read_bytes().replace(name, b"../0.distcp" + b"p")
    (folder / ".metadata").write_bytes(outside)
    with pytest.raises(UserError, match="outside of the folder"):
        DistributedCheckpoint(folder)


def test_chunks_fill_a_tensor_once():
    def check(size, *chunks):
        _check_tiling("w", size, [_Chunk(*chunk, "f", 0, 0) for chunk in chunks])

    check((), ((), ()))
    check((4, 2), ((0, 0), (3, 2)), ((3, 0), (1, 1)), ((3, 1), (1, 1)))
    check((4,), ((0,), (4,)), ((4,), (0,)))
    for match, chunks in {
        "gaps": [((0,), (3,))],
        "overlap": [((0,), (3,)), ((2,), (1,))],
        "beyond": [((2,), (4,))],
        "beyond it": [((-1,), (4,))],
        "other axes": [((0, 0), (4, 1))],
    }.items():
        with pytest.raises(PickleFault, match=match):
            check((4,), *chunks)
