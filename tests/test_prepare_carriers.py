"""The same images give the same latents and the same counts, whichever source carried them.

279 images and ten of no use, and Ray itself: make test-ray.
"""

import sys

import pytest
from support.carriers import CARRIERS, captioned, outcome, write_carriers
from test_prepare_job import OPTIONS, TABLE, codec
from test_prepare_ray_engine import NODES, Ray

from microdit_jax.prepare import job, ray_engine
from microdit_jax.prepare.encoding import make_towers
from microdit_jax.prepare.request import PrepareRequest
from microdit_jax.prepare.sources.registry import KINDS

GOOD, BAD = 11, 5
REASONS = {"cannot be decoded (OSError)": 1, "empty caption": 1, "not an image": 2}
REASONS |= {"smaller than 16 pixels": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("carriers")
    codec().save(folder / "codec")
    folder.joinpath("in").mkdir()
    return folder


@pytest.fixture(scope="module")
def inputs(folder):
    return write_carriers(folder / "in", captioned(GOOD, BAD))


def made(folder, inputs, name, output):
    source, path = inputs[name]
    return PrepareRequest(
        source=source, input=path, fraction=1.0, source_options={}, vae=str(folder / "codec"),
        text_encoder=TABLE.name, dtype="float32", output=str(output), options=OPTIONS, threads=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def expected(folder, inputs):
    """What comes of the folder with texts."""
    output = folder / "expected"
    asked = made(folder, inputs, "folder", output)
    towers = make_towers(codec(), TABLE, OPTIONS.seed)
    job.run(asked.open_source(), towers, output, OPTIONS, request={}, progress=False)
    found = outcome(output, *OPTIONS.resolutions)
    assert found["records"] == GOOD and found["reasons"] == REASONS
    assert len(found) == 3 + len(OPTIONS.resolutions) * GOOD
    return found


def test_every_source_is_among_them():
    assert {source for source, _ in CARRIERS.values()} == KINDS.keys() - {"emoji", "openmoji"}


@pytest.mark.parametrize("name", CARRIERS)
def test_the_same_images_give_the_same_latents(folder, inputs, expected, tmp_path, name):
    asked = made(folder, inputs, name, tmp_path)
    towers = make_towers(codec(), TABLE, OPTIONS.seed)
    job.run(asked.open_source(), towers, tmp_path, OPTIONS, request={}, progress=False)
    assert outcome(tmp_path, *OPTIONS.resolutions) == expected


@pytest.mark.parametrize("name", ["table", "webdataset", "parquet", "mds", "tfds"])
def test_so_do_actors(folder, inputs, expected, tmp_path, name, monkeypatch):
    ray = Ray(NODES)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.exceptions", ray.exceptions)
    asked = made(folder, inputs, name, tmp_path)
    towers = make_towers(codec(), TABLE, OPTIONS.seed)
    ray_engine.run(asked, asked.open_source(), towers[0], progress=False)
    assert outcome(tmp_path, *OPTIONS.resolutions) == expected
