"""A lost index of an MDS dataset, made anew from the shards' headers."""

import json
import os
import shutil

import numpy as np
import pytest
from conftest import GOLDEN

from microdit_jax.commands.boundary import outcome
from microdit_jax.data import compression
from microdit_jax.data.mds import MdsReader
from microdit_jax.errors import UserError
from microdit_jax.prepare.mds_index import main, rebuild_index

SHARDS = ("plain", "zstd", "gz", "bz2", "br", "snappy", "merged")


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(GOLDEN / "mds", tmp_path / "mds")


@pytest.mark.parametrize("name", SHARDS)
def test_the_same_samples_as_before(folder, name, capsys):
    """Of shards that the library wrote: plain, compressed in each way, and in subfolders."""
    before = [dict(sample) for sample in MdsReader(folder / name)]
    (folder / name / "index.json").unlink()
    with pytest.raises(UserError, match="python -m microdit_jax.prepare.mds_index --input="):
        MdsReader(folder / name)
    main([f"--input={folder / name}"])
    assert f"shards with {len(before)} samples" in capsys.readouterr().out
    reader = MdsReader(folder / name)
    assert [dict(sample) for sample in reader] == before
    with pytest.raises(UserError, match="expected no index.json"):
        rebuild_index(folder / name)


def test_a_shard_unpacked_beside_its_compressed_one_is_one(folder):
    whole = MdsReader(folder / "zstd")
    before = [dict(sample) for sample in whole]  # unpacks them beside
    assert list((folder / "zstd").glob("*.mds"))
    (folder / "zstd" / "index.json").unlink()
    assert rebuild_index(folder / "zstd") == (2, 10)
    assert [dict(sample) for sample in MdsReader(folder / "zstd")] == before


def test_damaged_shards_and_none(folder, tmp_path, capsys):
    (tmp_path / "none").mkdir()
    assert outcome(lambda: main([f"--input={tmp_path / 'none'}"])) == 2
    assert "expected shards (*.mds)" in capsys.readouterr().err
    index = folder / "plain" / "index.json"
    index.unlink()
    shard = folder / "plain" / "shard.00001.mds"
    good = shard.read_bytes()
    for bad in (good[:100], good[:-1], b"", b"\xff" * 40, good[:4] + b"\0" * (len(good) - 4)):
        shard.write_bytes(bad)
        with pytest.raises(UserError, match="shard.00001.mds"):
            rebuild_index(folder / "plain")
        assert not index.exists()


@pytest.mark.parametrize("name", compression.NAMES)
def test_data_of_unknown_size(name):
    data = bytes(range(256)) * 20
    packed = compression.compress(name, data)
    assert bytes(compression.decompress_unsized(name, packed, 10_000)) == data
    for most, bad in ((1000, packed), (10_000, packed[:-9])):
        with pytest.raises(ValueError, match=name):
            compression.decompress_unsized(name, bad, most)


def test_a_shard_listed_twice_is_an_error(folder):
    path = folder / "plain" / "index.json"
    index = json.loads(path.read_text())
    index["shards"].append(index["shards"][0])
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"found shard\.00000\.mds twice"):
        MdsReader(folder / "plain")


def test_a_shard_cut_while_it_is_mapped_is_one_line(folder):
    """Reading beyond the file's end would end the process by SIGBUS."""
    reader = MdsReader(folder / "plain")
    sample = reader[0]
    path = folder / "plain" / "shard.00000.mds"
    size = path.stat().st_size
    os.truncate(path, 100)
    with pytest.raises(UserError, match=f"expected {size} bytes in .*shard.00000.mds, found 100"):
        reader[1]
    assert np.frombuffer(sample["latents_256"], "<f2").size == 64  # what was read stays


def test_a_shard_replaced_while_it_is_mapped_stays_whole(folder):
    reader = MdsReader(folder / "plain")
    second = reader[1]
    (folder / "plain" / "shard.00000.mds").unlink()
    assert reader[1] == second
