"""Programs of training and sampling, traced on abstract arrays: no weight is allocated."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from microdit_jax import sharding
from microdit_jax.errors import UserError
from microdit_jax.machine.slices import slices_of
from microdit_jax.models import dit, flops
from microdit_jax.models.dit import DiT, DiTConfig
from microdit_jax.sampling import programs as sampler
from microdit_jax.sampling.guidance import Form
from microdit_jax.training import config as run_config
from microdit_jax.training import source
from microdit_jax.training import step as train_step
from microdit_jax.training.start import with_options

CLIP_TOKENS = 77


class Program(NamedTuple):
    """A program before it is compiled, and what is known about it without compiling.

    Attributes:
      lower: traces the program for the compiler.
      images: images of one run, over all devices. With guidance the sampler's network sees twice
        as many.
      micro_batches: number of parts that a device computes one after the other.
      forward_flops: operations of one image's forward pass, by models/flops.py.
      passes: operations for each image in forward passes, without recomputation.
      recomputed: operations that remat adds, in forward passes.
      needed_communication: {"all-gather": bytes, "reduce-scatter": bytes} that one device must
        receive: each sharded weight once, each of its gradients once for each micro-batch, and
        between slices once. Gradients that travel in 16 bits are all-to-alls.
      num_params: parameters of the network.
      slices: slice of each device, in the mesh's order.
      arguments: shapes of what the program takes; empty for the sampler.
    """

    lower: Callable[[], jax.stages.Lowered]
    images: int
    micro_batches: int
    forward_flops: int
    passes: int
    recomputed: float
    needed_communication: dict[str, float]
    num_params: int
    slices: tuple[int, ...]
    arguments: tuple[Any, ...] = ()


def training(config: ConfigDict, mesh: Mesh, *, caption_length: int = CLIP_TOKENS) -> Program:
    """Prepares the training step of a run configuration.

    Args:
      mesh: mesh of real devices or of a topology's.
      caption_length: tokens l of a caption.
    Raises:
      UserError: the configuration cannot be run.
    """
    if config.data.captions != "embeddings":
        raise UserError(
            "the step is compiled without a text tower: data.captions must be embeddings, found "
            f"{config.data.captions!r}; leave it out"
        )
    model = DiT(run_config.model_config(config))
    cfg, n = model.config, config.train.batch_size
    optimizer, schedule = run_config.make_optimizer(config)
    state = train_step.abstract_state(model, optimizer, mesh, with_ema=config.ema.enabled)
    parts = run_config.num_micro_batches(config, mesh)
    batch = {
        "position": _rows(mesh, n, dtype=jnp.int32),
        "latents": _rows(mesh, n, cfg.input_size, cfg.input_size, cfg.in_channels),
        "caption_latents": _rows(mesh, n, caption_length, cfg.caption_channels, dtype=jnp.float16),
        "keep_caption": _rows(mesh, n),
    }
    step = run_config.make_step(config, model, optimizer, schedule, mesh)
    mask_ratio = config.train.mask_ratio
    weights = state.params
    frozen = (weights,) if config.teacher else ()
    if (lora := source.adapters(config)) is not None:
        frozen = (_held(weights, cfg),)
        state = source.abstract_adapters(
            lora, weights, optimizer, mesh, with_ema=config.ema.enabled
        )
    state = with_options(state, config.ema.snapshot_every, config.loss.learned_uncertainty)
    return Program(
        functools.partial(step.lower, state, batch, *frozen),
        n,
        parts,
        flops.forward_flops(cfg, mask_ratio, caption_length),
        run_config.over_forward(config),
        flops.recomputed_share(cfg, mask_ratio, caption_length),
        needed_communication(weights, model, mesh, parts, config.train.gradient_dtype),
        _count(weights),
        slices_of(mesh),
        (state, batch, *frozen),
    )


def _held(weights: Any, cfg: DiTConfig) -> Any:
    """Shapes of frozen weights as a run holds them: matrices in the type they are multiplied in."""
    cast = jax.eval_shape(functools.partial(dit.cast_matrices, config=cfg), weights)
    return jax.tree.map(
        lambda leaf, whole: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole.sharding),
        cast,
        weights,
    )


def sampling(
    config: ConfigDict,
    mesh: Mesh,
    *,
    images: int,
    guide: bool = True,
    caption_length: int = CLIP_TOKENS,
) -> Program:
    """Prepares one network evaluation of the sampler, on captions that are encoded already.

    Args:
      images: images sampled at a time over all devices.
      guide: classifier-free guidance, which doubles the network's batch.
    Raises:
      UserError: the images do not divide by the devices.
    """
    if images % mesh.size:
        raise UserError(
            f"images sampled at a time must be a multiple of {mesh.size} devices, found {images}"
        )
    model = DiT(run_config.model_config(config))
    cfg = model.config
    params = sharding.with_shardings(dit.abstract_params(cfg), mesh)
    form = Form.GUIDED if guide else Form.CONDITIONAL
    static = {"model": model, "mesh": mesh}
    x = _rows(mesh, images, cfg.input_size, cfg.input_size, cfg.in_channels)

    def lower():
        y = _rows(mesh, form.passes * images, caption_length, cfg.caption_channels)
        encode = sampler.encode_captions.lower(params, y, **static)
        caption = jax.tree.map(lambda a: _rows(mesh, *a.shape, dtype=a.dtype), encode.out_info)
        return sampler.evaluate_network.lower(
            params,
            caption,
            sampler.abstract_state(x),
            *sampler.abstract_scalars(),
            sigma_data=config.edm.sigma_data,
            form=form,
            **static,
        )

    text = flops.caption_flops(cfg, caption_length)
    return Program(
        lower,
        images,
        1,
        flops.forward_flops(cfg, 0.0, caption_length) - text,
        2 if guide else 1,
        0.0,
        needed_communication(params, None, mesh, 0),
        _count(params),
        slices_of(mesh),
    )


def needed_communication(
    params: Any,
    model: DiT | None,
    mesh: Mesh,
    micro_batches: int,
    gradient_dtype: str = "float32",
) -> dict[str, float]:
    """Computes the bytes that one device must receive in a step, as `Program` has them.

    Args:
      params: abstract parameters with their shardings.
      model: casts its weights before they are gathered; None: they are gathered as they are.
      micro_batches: number of times that gradients are summed; 0 without a backward pass.
    """
    specs = sharding.specs(params, mesh)
    gathered = params
    if model is not None:
        gathered = jax.eval_shape(lambda p: dit.cast_matrices(p, model.config), params)
    inside, across = (mesh.shape.get(axis, 1) for axis in sharding.SPLIT_AXES)
    width = jnp.dtype(gradient_dtype).itemsize
    summed = "reduce-scatter" if width == 4 else "all-to-all"
    total = {"all-gather": 0.0, summed: 0.0}
    for spec, weight in zip(
        jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, jax.sharding.PartitionSpec)),
        jax.tree.leaves(gathered),
        strict=True,
    ):
        _, axes = sharding.split_axes(spec)
        elements = math.prod(weight.shape) / (mesh.shape["expert"] if "expert" in spec else 1)
        for axis, size, times in (("fsdp", inside, micro_batches), ("slices", across, 1)):
            if axis in axes:
                received = elements * (size - 1) / size / (inside if axis == "slices" else 1)
                total["all-gather"] += received * weight.dtype.itemsize
                total[summed] += received * width * (times if micro_batches else 0)
    return total


def _rows(mesh: Mesh, *shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))


def _count(params: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
