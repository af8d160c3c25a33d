"""Datasets by mosaicml-streaming, Hugging Face's datasets, webdataset and img2dataset."""

import pytest
from support.source_files import read

from interop.conftest import write
from microdit_jax.data.mds import MdsReader
from microdit_jax.prepare.mds_index import rebuild_index
from microdit_jax.prepare.sources.registry import open_source

WRITERS = ("datasets", "webdataset", "img2dataset", "PIL")
# Folder of writers/image_datasets.py -> --source.
SOURCES = {
    "hf_disk": "parquet",
    "hf_parquet": "parquet",
    "img2dataset_files": "folder",
    "img2dataset_parquet": "parquet",
    "img2dataset_webdataset": "webdataset",
    "webdataset": "webdataset",
    "webdataset_packed": "webdataset",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write("image_datasets.py", folder, packages=WRITERS)
    return folder


@pytest.mark.parametrize("name", SOURCES)
def test_the_eight_images_whichever_writer_wrote_them(images, name):
    splits = ["train", "test"] if name == "hf_disk" else [None]
    found = {}
    for split in splits:
        good, _ = read(open_source(SOURCES[name], str(images / name), split=split))
        found |= {caption: round(red / 10) for _, caption, red in good}
    assert found == {f"number {i}": i for i in range(8)}


@pytest.mark.parametrize("compression", ["none", "zstd", "gz", "br", "bz2", "snappy"])
def test_mds_of_mosaicml_streaming(tmp_path, compression):
    write("mds.py", tmp_path / "mds", compression, packages=("streaming",))
    expected = [
        {"caption": f"number {i}", "latents": bytes([i]) * 64, "number": i} for i in range(50)
    ]
    assert list(MdsReader(tmp_path / "mds", check_hashes=True)) == expected
    (tmp_path / "mds" / "index.json").unlink()
    rebuild_index(tmp_path / "mds")
    assert list(MdsReader(tmp_path / "mds")) == expected
