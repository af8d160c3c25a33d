"""Opens stored latents in either format: an MDS dataset, or a TFDS one in ArrayRecord files."""

import os
from pathlib import Path
from typing import Any

from microdit_jax.data.mds import MdsReader
from microdit_jax.data.mds_format import INDEX
from microdit_jax.data.records import SIDECAR, LatentInfo, Store, StoredLatents, infer_info
from microdit_jax.data.shard_files import ShardFiles
from microdit_jax.errors import UserError
from microdit_jax.towers import Tokenizer

ARRAY_RECORD = "dataset_info.json"  # TFDS's own name for its description


def open_latents(
    root: str | os.PathLike,
    *,
    resolution: int,
    vae: str | None = None,
    text_encoder: str | None = None,
    caption_tokens: int = 77,
    captions: str = "embeddings",
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> StoredLatents:
    """Opens the records of a dataset of latents; a source for `pipeline.make_dataset`.

    Args:
      root: a local folder, or for MDS also an fsspec URL.
      resolution: pixels of a side of the images whose latents are wanted.
      vae, text_encoder, caption_tokens: towers that made the data, and l of its captions; needed
        for datasets without latents.json, as the reference's. With one, other names are an error.
      captions, tokenizer: see `StoredLatents`.
      options: `cache`, `cache_bytes`, `check_hashes` and `shuffled` of `MdsReader`.
    Raises:
      UserError: no dataset, a damaged one, or one made by other towers.
    """
    store, sidecar = open_store(root, **options)
    if sidecar is None:
        if not len(store):
            raise UserError(f"expected records in {root}, found an empty dataset; leave it out")
        sidecar = infer_info(
            store, vae=vae, text_encoder=text_encoder, caption_tokens=caption_tokens
        )
    source = StoredLatents(
        store, sidecar, resolution=resolution, captions=captions, tokenizer=tokenizer
    )
    source.check_made_by(vae=vae or source.vae, text_encoder=text_encoder or source.text_encoder)
    return source


def open_store(root: str | os.PathLike, **options: Any) -> tuple[Store, LatentInfo | None]:
    """Opens the stored bytes of a dataset, and its sidecar if it has one; options as above."""
    cache = options.get("cache")
    files = ShardFiles(root, cache=cache)
    sidecar = None
    if files.exists(SIDECAR):
        sidecar = LatentInfo.from_json(files.read(SIDECAR), files.location(SIDECAR))
    if files.exists(INDEX):
        return MdsReader(root, **options), sidecar
    if files.is_local and Path(root, ARRAY_RECORD).is_file():
        if unused := {name for name, value in options.items() if value}:
            raise UserError(
                f"{', '.join(sorted(unused))} is for MDS datasets, found ArrayRecord files in "
                f"{root}, which are checked as they are read, from a local or mounted disk"
            )
        from microdit_jax.data.arrayrecord import ArrayRecordStore  # TFDS takes a while to import

        return ArrayRecordStore(root), sidecar
    if not files.is_local and files.exists(ARRAY_RECORD):
        raise UserError(
            f"expected an MDS dataset at a URL, found ArrayRecord files in {files.root}, which are "
            "read from a local or mounted disk; copy them there (gcloud storage cp -r, aws s3 cp "
            "--recursive), or make MDS of them on that disk (python -m "
            "microdit_jax.prepare.reformat --to=mds)"
        )
    files.check_bucket()
    raise UserError(
        f"expected a dataset of latents in {root}, found neither {INDEX} (MDS) nor "
        f"{ARRAY_RECORD} (ArrayRecord); check the path, or merge the indices of its parts "
        "(microdit_jax.prepare.mds_writer.merge_index)"
    )
