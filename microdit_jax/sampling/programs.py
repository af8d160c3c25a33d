"""The sampler's compiled programs: captions encoded once, then one network evaluation at a time."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from microdit_jax import diffusion, sharding
from microdit_jax.diffusion import EdmConfig, HeunState
from microdit_jax.machine import memory
from microdit_jax.machine.placement import mesh_of, rows_sharding
from microdit_jax.models.dit import Caption, DiT
from microdit_jax.sampling import guidance


@functools.partial(jax.jit, static_argnames=("model", "guide", "mesh"))
def encode_captions(
    params: Any,
    caption_latents: Float[Array, "n l caption"],
    *,
    model: DiT,
    guide: bool,
    mesh: Mesh | None,
) -> Caption:
    """Computes everything that depends on the captions alone, once for all noise levels.

    Args:
      caption_latents: embeddings of n captions.
      guide: classifier-free guidance: each caption is followed by the zero caption, in the order
        that `guidance.guided` expects.
      mesh: the devices over which the batch, and perhaps the weights, are split; None: one device.
    """

    def encode(params, y):
        if guide:
            y = guidance.interleave(y, jnp.zeros_like(y))
        return model.apply({"params": params}, y, method="encode_caption")

    return sharding.on_each_device(encode, mesh, params, (caption_latents,))


@functools.partial(
    jax.jit, static_argnames=("model", "sigma_data", "guide", "mesh"), donate_argnames=("state",)
)
def evaluate_network(
    params: Any,
    caption: Caption,
    state: HeunState,
    at: dict[str, Array],
    guidance_scale: Float[Array, ""],
    *,
    model: DiT,
    sigma_data: float,
    guide: bool,
    mesh: Mesh | None,
) -> HeunState:
    """Evaluates the network once and updates the sampler's state.

    One program serves all evaluations of any number of steps at any guidance above 1.

    Args:
      caption: from `encode_captions`.
      at: a row of `diffusion.heun_evaluations`.
      guidance_scale: traced, so that another value compiles nothing.
    """

    def evaluate(params, caption, state, at, guidance_scale):
        def conditional(x, c_noise):
            return model.apply({"params": params}, x, c_noise, caption, method="predict")[0]

        network = guidance.guided(conditional, guidance_scale) if guide else conditional
        return diffusion.heun_evaluate(diffusion.denoiser(network, sigma_data), state, at)

    return sharding.on_each_device(evaluate, mesh, params, (caption, state), (at, guidance_scale))


def compile_programs(
    model: DiT, edm: EdmConfig, params: Any, size: int, length: int, *, guide: bool
) -> tuple[jax.stages.Compiled, jax.stages.Compiled]:
    """Compiles `encode_captions` and `evaluate_network` for batches of one size.

    Args:
      params: where they are says on which devices the programs run.
      size: images in a batch, a multiple of the number of devices.
      length: tokens l of a caption.
      guide: classifier-free guidance, which doubles the network's batch.
    Raises:
      UserError: the batch needs more memory than is free.
    """
    cfg, (row_sharding, _) = model.config, rows_sharding(params)
    rows = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32, sharding=row_sharding)
    static = {"model": model, "guide": guide, "mesh": mesh_of(params)}
    y = rows((size, length, cfg.caption_channels))
    encode = encode_captions.lower(params, y, **static).compile()
    caption = jax.tree.map(
        lambda info, sharding: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding),
        encode.out_info,
        encode.output_shardings,
    )
    x = rows((size, cfg.input_size, cfg.input_size, cfg.in_channels))
    at = {
        name: jax.ShapeDtypeStruct((), values.dtype)
        for name, values in diffusion.heun_evaluations(1).items()
    }
    evaluate = evaluate_network.lower(
        params,
        caption,
        HeunState(x, x, x),  # pyright: ignore[reportArgumentType]  (abstract arrays)
        at,
        jax.ShapeDtypeStruct((), jnp.float32),
        sigma_data=edm.sigma_data,
        **static,
    ).compile()
    memory.check_fit(evaluate, rows=size, what="batch_size")
    return encode, evaluate


@functools.partial(jax.jit, static_argnames="edm")
def start(noise: Float[Array, "n h w c"], *, edm: EdmConfig) -> HeunState:
    """The sampler's state before its first evaluation."""
    return diffusion.heun_start(noise, edm)


denoised = jax.jit(diffusion.heun_denoised)
