"""Opens the text encoders and codecs that need no pretrained weights, by name or folder."""

from pathlib import Path

from microdit_jax.encoders.patch_pca import PatchPCA
from microdit_jax.encoders.token_table import TokenTable
from microdit_jax.errors import UserError


def text_encoder(name: str) -> TokenTable:
    """Returns the frozen text encoder of that name.

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
    """Reads the codec stored in a folder."""
    return PatchPCA.load(Path(folder))
