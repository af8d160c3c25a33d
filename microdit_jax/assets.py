"""Models by name or path: converted folders, training runs, and PyTorch files."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from convert.dit import config_from_dict, from_torch
from convert.dit_infer import infer_config
from convert.state_dict import read_state_dict
from microdit_jax import checkpoint
from microdit_jax.diffusion import EdmConfig
from microdit_jax.errors import UserError
from microdit_jax.models.dit import DiT, DiTConfig


class Model(NamedTuple):
    """A network with its weights, and what its maker said about it.

    folder is the training run, or None; vae and text_encoder are names, or None where the file does
    not say; description tells a person what was loaded.
    """

    config: DiTConfig
    params: Any
    edm: EdmConfig
    vae: str | None
    text_encoder: str | None
    folder: Path | None
    description: str


def abstract_params(config: DiTConfig) -> Any:
    """Shapes and types of a network's parameters, on the first local device."""
    x = jnp.zeros((1, config.input_size, config.input_size, config.in_channels), jnp.float32)
    y = jnp.zeros((1, 1, config.caption_channels), jnp.float32)
    init = DiT(config).init
    shapes = jax.eval_shape(init, jax.random.key(0), x, jnp.zeros(1, jnp.float32), y)["params"]
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)


def load_model(name: str, *, ema: bool = True, dtype: str | None = None) -> Model:
    """Loads a model folder (python -m convert), a training run, or a .pt / .safetensors file.

    Args:
      name: the path.
      ema: of a training run, the moving average of the weights, if it keeps one.
      dtype: type of the computation; None keeps the model's own.
    Raises:
      UserError: nothing usable there, or damaged.
    """
    path = Path(name)
    if path.is_file():
        state_dict = read_state_dict(path)
        config = infer_config(state_dict)
        params = jax.tree.map(jnp.asarray, from_torch(state_dict, config))
        model = Model(config, params, EdmConfig(), None, None, None, f"{path.name}")
    elif checkpoint.is_run(path):
        meta = checkpoint.read_run_metadata(path)
        config, ema = config_from_dict(meta["dit"]), ema and meta["has_ema"]
        params, step = checkpoint.load_run_params(path, abstract_params(config), ema=ema)
        kind = "moving average" if ema else "raw weights"
        model = Model(
            config,
            params,
            EdmConfig(**meta["edm"]),
            meta["vae"],
            meta["text_encoder"],
            path,
            f"{path}, step {step}, {kind}",
        )
    elif path.is_dir():
        params, meta = checkpoint.load_model(path)
        model = Model(
            config_from_dict(meta["dit"]), params, EdmConfig(), None, None, None, f"{path}"
        )
    else:
        raise UserError(
            f"--model must be a training run, a folder made by python -m convert, or a .pt or "
            f".safetensors file, found nothing at {name}"
        )
    if dtype is not None:
        model = model._replace(config=dataclasses.replace(model.config, dtype=dtype))
    return model
