"""Text encoders and image codecs by the names that data and models carry."""

from pathlib import Path

from microdit_jax.encoders.patch_pca import PatchPCA
from microdit_jax.encoders.token_table import TokenTable
from microdit_jax.errors import UserError


def text_encoder(name: str) -> TokenTable:
    """The frozen text encoder of that name, with `.name`, `.encode(ids)` and `.encode_text(texts)`.

    Raises:
      UserError: no such encoder.
    """
    if name.startswith("table:"):
        return TokenTable.from_name(name)
    raise UserError(
        f"text encoder must be table:width=W,tokens=L,seed=S, found {name!r}; "
        "pretrained towers are loaded by microdit_jax.assets.load.load_text_encoder"
    )


def image_codec(folder: str | Path) -> PatchPCA:
    """The codec stored in a folder, with `.name`, `.scaling_factor`, `.encode` and `.decode`."""
    return PatchPCA.load(Path(folder))
