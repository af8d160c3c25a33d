"""Reads everything of a dataset: what a hostile one is given to, in a process of its own."""

from pathlib import Path

from microdit_jax.data.mds import MdsReader
from microdit_jax.data.stores import open_latents


def read_mds(folder: str) -> None:
    """Reads all samples of an MDS dataset."""
    reader = MdsReader(folder)
    for index in range(len(reader)):
        reader[index]


def read_latents(folder: str) -> None:
    """Reads all records of a dataset of latents."""
    towers = {"vae": "v", "text_encoder": "t"}
    source = open_latents(folder, resolution=256, caption_tokens=4, **towers)
    for index in range(len(source)):
        source[index]


def read_png(path: str) -> None:
    """Takes a PNG's settings as sample_main.py does, without flags."""
    import sample_main

    sample_main.flags.FLAGS(["sample_main.py"])
    sample_main._take_settings(Path(path))
