"""MDS <-> ArrayRecord: nothing lost, resumed after any kill, shared by processes."""

import os
import signal
import subprocess
import sys
import time

import pytest
from support.latent_datasets import (
    COLUMNS,
    INFO,
    arrays,
    contents,
    sample,
    write_array_record,
    write_mds,
)

from microdit_jax.data.records import LatentInfo
from microdit_jax.data.stores import open_latents, open_store
from microdit_jax.errors import UserError
from microdit_jax.prepare import reformat as module
from microdit_jax.prepare.reformat import reformat

QUIET = {"progress": False, "records_per_shard": 4}


def test_there_and_back_gives_the_same_samples(tmp_path):
    write_mds(tmp_path / "mds", count=10)
    reformat(str(tmp_path / "mds"), tmp_path / "ar", to="arrayrecord", **QUIET)
    reformat(str(tmp_path / "ar"), tmp_path / "back", to="mds", compression="zstd", **QUIET)
    for name in ("ar", "back"):
        store, info = open_store(tmp_path / name)
        assert len(store) == 10 and info == INFO
        for index in range(10):
            found = {key: bytes(value) for key, value in store.raw(index).items()}
            assert found == sample(index)
    assert (tmp_path / "back/000002/shard.00000.mds.zstd").exists()


def test_the_references_datasets_are_told_what_made_them(tmp_path):
    columns = {k: v for k, v in COLUMNS.items() if k not in ("id", "caption_tokens")}
    write_mds(tmp_path / "mds", columns=columns, info=None)
    with pytest.raises(UserError, match="state the VAE"):
        reformat(str(tmp_path / "mds"), tmp_path / "ar", to="arrayrecord", **QUIET)
    told = {"vae": "a", "text_encoder": "b", "caption_tokens": 7}
    reformat(str(tmp_path / "mds"), tmp_path / "ar", to="arrayrecord", **told, **QUIET)
    source = open_latents(tmp_path / "ar", resolution=256)
    assert source.info == LatentInfo("a", "b", INFO.latents, (7, 6))
    assert [source[i]["id"] for i in range(6)] == list("012345")
    assert (source[5]["caption_latents"] == arrays(5)["caption_latents"]).all()


@pytest.mark.parametrize("to", ["mds", "arrayrecord"])
def test_an_interrupted_conversion_goes_on(tmp_path, to, monkeypatch):
    write = {"mds": write_array_record, "arrayrecord": write_mds}[to]
    write(tmp_path / "in", count=10)
    arguments = (str(tmp_path / "in"),)
    reformat(*arguments, tmp_path / "whole", to=to, **QUIET)

    class Killed(BaseException):
        pass

    reads, samples = [], module._samples

    def failing(store, info, indices):
        for made in samples(store, info, indices):
            reads.append(made["id"])
            if len(reads) in (2, 7, 11):
                raise Killed
            yield made

    monkeypatch.setattr(module, "_samples", failing)
    for _ in range(3):
        with pytest.raises(Killed):
            reformat(*arguments, tmp_path / "out", to=to, **QUIET)
        assert not (tmp_path / "out/index.json").exists()
    reformat(*arguments, tmp_path / "out", to=to, **QUIET)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    before = len(reads)
    reformat(*arguments, tmp_path / "out", to=to, **QUIET)
    assert len(reads) == before
    with pytest.raises(UserError, match="records_per_shard=4, now 5; use those"):
        reformat(*arguments, tmp_path / "out", to=to, progress=False, records_per_shard=5)


@pytest.mark.parametrize("to", ("mds", "arrayrecord"))
def test_a_process_does_the_parts_of_others_too(tmp_path, monkeypatch, to):
    """Its own first; one that another has written meanwhile stays."""
    write_mds(tmp_path / "in", count=10)
    arguments = (str(tmp_path / "in"), tmp_path / "out")
    samples, written = module._samples, []

    def noted(store, info, indices):
        written.append(indices.start // 4)
        if written == [1]:  # another host does the same meanwhile
            reformat(*arguments, to=to, **QUIET)
        return samples(store, info, indices)

    monkeypatch.setattr(module, "_samples", noted)
    reformat(*arguments, to=to, process_index=1, process_count=3, **QUIET)
    assert written == [1, 0, 1, 2]
    monkeypatch.undo()
    reformat(arguments[0], tmp_path / "whole", to=to, **QUIET)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_command_survives_being_killed(tmp_path):
    write_mds(tmp_path / "in", count=200)
    command = [sys.executable, "-m", "microdit_jax.prepare.reformat", f"--input={tmp_path / 'in'}"]
    command += [f"--output={tmp_path / 'out'}", "--to=mds", "--records_per_shard=2"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    killed = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out/000003").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL and not (tmp_path / "out/index.json").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "complete" in done.stdout, done.stderr
    reformat(
        str(tmp_path / "in"), tmp_path / "whole", to="mds", progress=False, records_per_shard=2
    )
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"to": "tfrecord"}, "--to must be one of mds, arrayrecord"),
        ({"records_per_shard": 0}, "--records_per_shard must be at least 1, found 0"),
        ({"process_index": 1}, "--process_index must be 0 to 0, found 1"),
        ({"process_count": 0}, "--process_count must be at least 1, found 0"),
        ({"compression": "zstd"}, "--compression is for --to=mds"),
        ({"compression": "foo", "to": "mds"}, "--compression: unknown compression 'foo', known"),
        ({"input": "nowhere"}, "expected a dataset of latents in nowhere"),
    ],
)
def test_bad_values_are_named(tmp_path, changes, message):
    write_mds(tmp_path / "in")
    arguments = {"input": str(tmp_path / "in"), "to": "arrayrecord"} | QUIET | changes
    with pytest.raises(UserError, match=message):
        reformat(output=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_mixed_shapes_and_strangers_folders_are_refused(tmp_path):
    write_mds(tmp_path / "in", changes={3: {"latents_256": bytes(8)}})
    with pytest.raises(UserError, match="8192 bytes of latents_256 in sample 1 of .*found 8"):
        reformat(str(tmp_path / "in"), tmp_path / "out", to="arrayrecord", **QUIET)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="found something else there"):
        reformat(str(tmp_path / "in"), tmp_path / "mine", to="mds", **QUIET)
