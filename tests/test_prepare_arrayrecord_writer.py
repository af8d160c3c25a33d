"""ArrayRecord files give back every byte; arrays in another encoding than raw bytes are refused."""

import datetime
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.latent_datasets import write_array_record

from microdit_jax.data.arrayrecord import ArrayRecordStore
from microdit_jax.data.records import LatentInfo
from microdit_jax.data.stores import open_store
from microdit_jax.errors import UserError
from microdit_jax.prepare import arrayrecord_writer as writer

INFO = LatentInfo("vae", "text", {8: (1, 1, 1)}, (1, 2), 3, 0.5, "CC-BY")
SAMPLE = st.fixed_dictionaries(
    {"caption": st.binary(max_size=50), "id": st.binary(max_size=9)}
    | {
        name: st.binary(min_size=column.nbytes, max_size=column.nbytes)
        for name, column in INFO.arrays.items()
    }
)


@settings(max_examples=15, deadline=datetime.timedelta(seconds=20), derandomize=True)
@given(st.lists(st.lists(SAMPLE, min_size=1, max_size=5), min_size=1, max_size=3))
def test_any_samples_come_back(shards):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number, samples in enumerate(shards):
            writer.write_shard(writer.shard_path(folder, number, len(shards)), samples)
        writer.write_metadata(folder, INFO, [len(samples) for samples in shards])
        store, info = open_store(folder)
        assert info == INFO and len(store) == sum(map(len, shards))
        expected = [sample for samples in shards for sample in samples]
        assert [store.raw(index) for index in range(len(store))] == expected


def test_arrays_in_another_encoding_are_refused(tmp_path):
    path = write_array_record(tmp_path / "data") / "features.json"
    text = path.read_text()
    assert '"encoding": "bytes"' in text
    path.write_text(text.replace('"encoding": "bytes"', '"encoding": "none"'))
    with pytest.raises(UserError, match="expected arrays as raw bytes in .*data, found .* encoded"):
        ArrayRecordStore(tmp_path / "data")


def test_a_shard_is_there_when_it_is_whole(tmp_path):
    def samples():
        yield {"caption": b"x"}
        raise ValueError

    path = writer.shard_path(tmp_path, 0, 1)
    with pytest.raises(ValueError):
        writer.write_shard(path, samples())
    assert not list(tmp_path.iterdir())
