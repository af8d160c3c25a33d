"""Folders that this project finds by itself: the cache, and what a wheel carries."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache folder of this project: converted checkpoints and compiled programs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "microdit_jax"


def shipped(name: str) -> Path:
    """A file or folder of the checkout's top level that a wheel carries inside the package.

    The installed copy comes first; in a checkout there is none, and the top level's own is used.
    """
    package = Path(__file__).parents[1]
    inside = package / name
    return inside if inside.exists() else package.parent / name
