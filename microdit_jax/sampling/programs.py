"""The sampler's compiled programs: captions encoded once, then one network evaluation at a time."""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from microdit_jax import diffusion, sharding
from microdit_jax.diffusion import Denoiser, EdmConfig, Latents
from microdit_jax.machine import memory
from microdit_jax.machine.placement import mesh_of, rows_sharding
from microdit_jax.models.dit import Caption, DiT
from microdit_jax.sampling import guidance, solvers
from microdit_jax.sampling.coefficients import Evaluation
from microdit_jax.sampling.guidance import Form, Strength
from microdit_jax.sampling.solvers import SolverState


class SamplerState(NamedTuple):
    """State between two network evaluations: the solver's and guidance's.

    Attributes:
      solver: the solver's own state.
      average: running average of guidance's difference, for `guidance.adjusted` alone.
    """

    solver: SolverState
    average: Latents


class Known(NamedTuple):
    """Latents that an image is to have where it is not changed.

    Attributes:
      latents: (n, h, w, channels), scaled.
      free: (n, h, w, 1), 1 where the image is made anew, 0 where it stays.
    """

    latents: Latents
    free: Float[Array, "n h w 1"]


@functools.partial(jax.jit, static_argnames=("model", "mesh"))
def encode_captions(
    params: Any, caption_latents: Float[Array, "n l caption"], *, model: DiT, mesh: Mesh | None
) -> Caption:
    """Computes everything that depends on the captions alone, once for all noise levels.

    Args:
      caption_latents: embeddings of n captions. For programs that guide, each is followed by that
        of the zero caption or the negative prompt, as `guidance.interleave` does it.
      mesh: the devices over which the batch, and perhaps the weights, are split; None: one device.
    """

    def encode(params, y):
        return model.apply({"params": params}, y, method="encode_caption")

    return sharding.on_each_device(encode, mesh, params, (caption_latents,))


@functools.partial(
    jax.jit, static_argnames=("model", "sigma_data", "form", "mesh"), donate_argnames=("state",)
)
def evaluate_network(
    params: Any,
    caption: Caption | dict[str, Caption],
    state: SamplerState,
    at: Evaluation,
    strength: Strength,
    known: Known | None = None,
    *,
    model: DiT,
    sigma_data: float,
    form: Form,
    mesh: Mesh | None,
) -> SamplerState:
    """Evaluates the network once and updates the sampler's state.

    One program of each form serves all solvers, numbers of steps and strengths of guidance.

    Args:
      params, caption: the weights, and what `encode_captions` makes of them; for Form.AUTO a pair
        of each, {"main": ..., "weaker": ...}.
      at: one of a solver's evaluations.
      strength: of guidance, for the forms that guide.
      known: what stays of a given image. The denoised image is set to it there, for which the
        equation has an exact solution, latents + sigma noise, on which every solver here stays.
      form: the conditional and the unconditional one are the same program.
    """

    def evaluate(params, caption, state, known, at, strength):
        def network_of(params, caption):
            def network(x, c_noise):
                return model.apply({"params": params}, x, c_noise, caption, method="predict")[0]

            return network

        solver, average = state

        def adjusted(x, sigma):
            nonlocal average
            D, average = guidance.adjusted(network, x, sigma, average, strength, sigma_data)
            return D

        if form == Form.AUTO:
            main, weaker = (network_of(params[p], caption[p]) for p in ("main", "weaker"))
            F = guidance.autoguided(main, weaker, strength.scale)
        else:
            network = network_of(params, caption)
            guided = form == Form.GUIDED
            F = guidance.guided(network, strength.scale) if guided else network
        denoise = adjusted if form == Form.ADJUSTED else diffusion.denoiser(F, sigma_data)
        if known is not None:
            denoise = keeping(denoise, known)
        return SamplerState(solvers.evaluate(denoise, solver, at), average)

    rows = (caption, state, known)
    return sharding.on_each_device(evaluate, mesh, params, rows, (at, strength))


def keeping(denoise: Denoiser, known: Known) -> Denoiser:
    """Returns the denoiser whose result is the known latents wherever they are to stay."""

    def denoise_the_rest(x: Latents, sigma: Float[Array, " n"]) -> Latents:
        return jnp.where(known.free > 0, denoise(x, sigma), known.latents)

    return denoise_the_rest


def compile_programs(
    model: DiT,
    edm: EdmConfig,
    params: Any,
    size: int,
    length: int,
    *,
    form: Form,
    edits: bool = False,
) -> tuple[jax.stages.Compiled, jax.stages.Compiled]:
    """Compiles `encode_captions` and `evaluate_network` for batches of one size.

    Args:
      params: where they are says on which devices the programs run; a pair for Form.AUTO.
      size: images in a batch, a multiple of the number of devices.
      length: tokens l of a caption.
      form: of an evaluation; those that guide double the network's batch.
      edits: with known latents.
    Raises:
      UserError: the batch needs more memory than is free.
    """
    cfg, (row_sharding, _) = model.config, rows_sharding(params)
    rows = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32, sharding=row_sharding)
    static = {"model": model, "mesh": mesh_of(params)}
    y = rows((form.captions * size, length, cfg.caption_channels))
    one = params["main"] if form == Form.AUTO else params
    encode = encode_captions.lower(one, y, **static).compile()
    caption = jax.tree.map(
        lambda info, sharding: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding),
        encode.out_info,
        encode.output_shardings,
    )
    if form == Form.AUTO:
        caption = {"main": caption, "weaker": caption}
    x = rows((size, cfg.input_size, cfg.input_size, cfg.in_channels))
    latents, free = cast(Any, (x, rows((*x.shape[:3], 1))))
    known = Known(latents, free) if edits else None
    evaluate = evaluate_network.lower(
        params,
        caption,
        abstract_state(x),
        *abstract_scalars(),
        known,
        sigma_data=edm.sigma_data,
        form=form,
        **static,
    ).compile()
    memory.check_fit(evaluate, rows=size, what="batch_size")
    return encode, evaluate


def abstract_state(x: jax.ShapeDtypeStruct) -> SamplerState:
    """Returns the state of latents that have only a shape and a sharding."""
    abstract: Any = x
    return SamplerState(SolverState(*[abstract] * 4), abstract)


def abstract_scalars() -> tuple[Evaluation, Strength]:
    """Returns the shapes of what `evaluate_network` takes beside the batch."""
    row = solvers.heun(np.array([1.0, 0.0]))[0]
    strength = Strength(1.0).as_float32()
    return jax.eval_shape(lambda *scalars: scalars, row, strength)


@functools.partial(jax.jit, static_argnames="edm")
def start(noise: Float[Array, "n h w c"], *, edm: EdmConfig) -> SamplerState:
    """The sampler's state before its first evaluation."""
    solver = solvers.start(noise, edm)
    return SamplerState(solver, 0 * solver.x)


@jax.jit
def denoised(state: SamplerState, at: Evaluation) -> Latents:
    """Recovers the denoised latents of the last evaluation, as `solvers.denoised` does."""
    return solvers.denoised(state.solver, at)


@jax.jit
def start_from(
    noise: Float[Array, "n h w c"], latents: Latents, sigma: Float[Array, ""]
) -> SamplerState:
    """The state before the first evaluation of an image that is to be changed.

    Args:
      sigma: the first noise level.
    """
    solver = solvers.start_at(latents + sigma * noise)
    return SamplerState(solver, 0 * solver.x)


@functools.partial(jax.jit, donate_argnames="state")
def add_noise(
    state: SamplerState, noise: Float[Array, "n h w c"], deviation: Float[Array, ""]
) -> SamplerState:
    """Adds noise to the x of the next evaluation, which begins a step."""
    return state._replace(solver=state.solver._replace(x=state.solver.x + deviation * noise))
