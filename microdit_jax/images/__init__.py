"""Image files that carry the settings they were sampled with, and captioned grids of them."""

from microdit_jax.images.files import (
    FORMATS,
    encode_image,
    encode_png,
    file_name,
    is_made_so,
    read_png,
    read_settings,
    save_image,
    save_png,
    to_uint8,
)
from microdit_jax.images.grid import captioned_grid
from microdit_jax.images.settings import MAX_IMAGES, MAX_STEPS, ImageSettings

__all__ = [
    "FORMATS",
    "MAX_IMAGES",
    "MAX_STEPS",
    "ImageSettings",
    "captioned_grid",
    "encode_image",
    "encode_png",
    "file_name",
    "is_made_so",
    "read_png",
    "read_settings",
    "save_image",
    "save_png",
    "to_uint8",
]
