"""A whole CLIP of a few thousand weights, and its OpenCLIP config."""

import json

import numpy as np

from microdit_jax.convert import clip
from microdit_jax.encoders.clip import ClipConfig
from microdit_jax.encoders.clip_image import ClipImageConfig
from microdit_jax.encoders.clip_text import ClipTextConfig
from support.synthetic import synthetic_state_dict


def openclip_config(golden, activation: str) -> dict:
    cfg = json.loads(str(golden["config"]))
    return {"model_cfg": cfg | {"quick_gelu": activation == "quick_gelu"}}


def small_config(activation: str = "quick_gelu") -> ClipConfig:
    text = ClipTextConfig(width=16, layers=2, heads=2, vocab_size=64, activation=activation)
    image = ClipImageConfig(
        width=32, layers=2, heads=4, image_size=32, patch_size=8, activation=activation
    )
    return ClipConfig(text, image, 24)


def small_tensors(layout: str = "openclip") -> dict[str, np.ndarray]:
    table = clip.rename_table(small_config(), layout)
    return synthetic_state_dict({e.torch_name: e.torch_shape for e in table}, 3)
