"""Opens the text encoders and codecs that need no pretrained weights, by name or folder."""

from pathlib import Path

from microdit_jax.encoders.patch_pca import PatchPCA
from microdit_jax.encoders.token_table import TokenTable
from microdit_jax.encoders.word_vectors import WordVectors
from microdit_jax.errors import UserError


def is_text_encoder(name: str) -> bool:
    """Returns True for a name that `text_encoder` takes, as its beginning tells."""
    return name.startswith(("table:", "words:"))


def text_encoder(name: str) -> TokenTable | WordVectors:
    """Returns the frozen text encoder of that name.

    Raises:
      UserError: no such encoder.
    """
    if name.startswith("table:"):
        return TokenTable.from_name(name)
    if name.startswith("words:"):
        return WordVectors.from_name(name)
    raise UserError(
        f"text encoder must be table:width=W,tokens=L,seed=S or words:tokens=L, found {name!r}; "
        "pretrained towers are loaded by microdit_jax.assets.load.load_text_encoder"
    )


def image_codec(folder: str | Path) -> PatchPCA:
    """Reads the codec stored in a folder."""
    return PatchPCA.load(Path(folder))
