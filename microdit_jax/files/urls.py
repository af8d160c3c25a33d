"""URLs of object stores among paths: told apart from local ones, so that none becomes a folder."""

import os
import re

from microdit_jax.errors import UserError, visible

# With one slash too: what pathlib makes of a URL. One letter before the colon is no scheme.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
COPY_FIRST = "copy it to a local disk first (gcloud storage cp -r, aws s3 cp --recursive)"
COPY_AFTERWARDS = (
    "give a folder on a local disk, and copy it afterwards (gcloud storage cp -r, aws s3 cp "
    "--recursive)"
)


def scheme_of(path: str | os.PathLike) -> str:
    """Returns "gs", "s3", ... for a URL, "" for a local path. `./gs:/x` is a local path."""
    found = _URL.match(os.fspath(path))
    return found[1].lower() if found else ""


def check_local(path: str | os.PathLike) -> None:
    """Raises UserError for a URL where only a local path can be used.

    `pathlib` takes a URL without complaint, and would make a local folder named "gs:".
    """
    if scheme_of(path):
        shown = visible(as_given(path))
        raise UserError(f"expected a local path, found the URL {shown}; {COPY_FIRST}")


def as_given(url: str | os.PathLike) -> str:
    """Returns a URL with the two slashes of which pathlib keeps one."""
    scheme, _, rest = os.fspath(url).partition(":")
    return f"{scheme.lower()}://{rest.lstrip('/')}"


_shown: dict[str, str] = {}


def show_as(path: str | os.PathLike, url: str | None) -> None:
    """Lets a local path that stands for a URL be shown as that (`with_urls`); None ends it."""
    if url is None:
        _shown.pop(os.fspath(path), None)
    else:
        _shown[os.fspath(path)] = url


def with_urls(text: str) -> str:
    """Returns a text with the URLs in place of the local paths that stand for them."""
    for path, url in _shown.items():
        if path in text:
            text = text.replace(path, url)
    return text


def url_of(path: str | os.PathLike) -> str:
    """Returns the URL that a local path stands for (`show_as`), "" for none."""
    return _shown.get(os.fspath(path), "")
