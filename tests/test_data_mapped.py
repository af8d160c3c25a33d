"""Maps of files hold no open file: a batch may lie in more shards than a process may open files."""

import os
import resource

import numpy as np
import pytest

from microdit_jax.data.mapped import map_file
from microdit_jax.data.mds import MdsReader
from microdit_jax.errors import UserError
from microdit_jax.machine import open_files
from microdit_jax.prepare.mds_writer import MdsWriter


@pytest.fixture
def few_files():
    """Leaves this process room for 40 more files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(map(int, os.listdir("/proc/self/fd"))) + 40
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_one_record_of_each_of_1500_shards_at_once(tmp_path, few_files):
    with MdsWriter(tmp_path, {"x": "bytes"}, size_limit=600) as writer:
        for number in range(1500):
            writer.write({"x": number.to_bytes(4, "little") * 100})
    reader = MdsReader(tmp_path)
    assert len(reader.shards) == 1500
    views = [reader.raw(number)["x"] for number in range(1500)]
    assert [np.frombuffer(view, "<i4")[7] for view in views] == list(range(1500))


def test_a_map_lives_as_long_as_its_views(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)) * 100)
    with path.open("rb") as file:
        view = map_file(file)
    assert view.readonly and len(view) == 20_000
    array = np.frombuffer(view[100:108], np.uint8)
    del view
    path.unlink()
    assert array.tolist() == list(range(100, 108))
    empty = tmp_path / "empty"
    empty.touch()
    with empty.open("rb") as file, pytest.raises(ValueError):
        map_file(file)


def test_the_limit_is_raised_and_named_where_it_is_the_reason(few_files):
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert open_files.raise_limit() == hard
    open_files.check_room(3, "the dataset")
    if hard not in (resource.RLIM_INFINITY, -1):
        with pytest.raises(UserError, match=rf"found a limit of {hard:,}; raise it \(ulimit -n"):
            open_files.check_room(hard, "the dataset")
