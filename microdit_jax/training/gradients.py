"""Gradients of a batch's mean loss, over the mesh and in micro-batches."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

from microdit_jax import sharding
from microdit_jax.diffusion import EdmConfig
from microdit_jax.errors import UserError
from microdit_jax.models.dit import DiT
from microdit_jax.models.weights import block_names, cast_matrices
from microdit_jax.training import streaming, uncertainty
from microdit_jax.training.loss import Batch, batch_loss, with_position

# Like `loss.batch_loss`, with frozen weights behind the trained ones
FrozenLoss = Callable[..., tuple[Float[Array, " n"], Float[Array, " n"]]]


class Gradients(NamedTuple):
    """Gradients of the batch's mean loss, float32, sharded like the parameters.

    Trees of PartitionSpecs take the same form, hence Any.

    Attributes:
      grads: the tree of gradients.
      norm: of all gradients together, ().
      loss, sigma: of each image, (n,).
    """

    grads: Any
    norm: Any
    loss: Any
    sigma: Any


class PartGradients(NamedTuple):
    """Gradients of one micro-batch, or the sum of several, before the sum over all devices."""

    grads: Any
    loss: Float[Array, " n"]
    sigma: Float[Array, " n"]


def make_gradients(
    model: DiT,
    *,
    edm: EdmConfig,
    mask_ratio: float,
    mesh: Mesh | AbstractMesh | None = None,
    micro_batches: int = 1,
    gradient_dtype: str = "float32",
    replicate_below: int = sharding.REPLICATE_BELOW,
    frozen_loss: FrozenLoss | None = None,
) -> Callable[..., Gradients]:
    """Makes the function (params, batch, key) -> Gradients, over the mesh and micro-batches.

    With a loss of frozen weights, the function takes those as one more argument, sharded alike.
    With `levels`, the weights of a learned uncertainty, images count by it; the losses that are
    returned are the plain ones.

    Weights are all-gathered once a step, matrices in the type that the network computes in (XL/2 in
    bfloat16: 2.7 GB), and stay for all micro-batches. Each micro-batch's gradients are summed into
    float32 shards at once, so that only one backward pass's gradients are ever whole. Sums over
    axes that a weight is not split over, and over slices, wait for the last micro-batch. With one
    micro-batch, weights split over slices are gathered and summed block by block (`streaming`).

    Args:
      gradient_dtype: type that gradients travel in (`sharding.scatter_sum`).
    Raises:
      UserError: at the first call, a batch that does not divide.
    """
    devices, layout = 1 if mesh is None else mesh.size, {"replicate_below": replicate_below}
    cast = functools.partial(cast_matrices, config=model.config)
    across = mesh is not None and "slices" in mesh.axis_names
    scatter = functools.partial(sharding.scatter_sum, dtype=gradient_dtype)
    by_block = across and micro_batches == 1 and frozen_loss is None

    def device_gradients(specs, weights, batch, key, levels=None):
        """Gradients on one device, of its own images; specs is None without a mesh."""
        num_images = batch["latents"].shape[0] * devices
        params = weights if frozen_loss is None else weights["trained"]
        if by_block:
            blocks = set(block_names(model.config))
            rest = {name: weights[name] for name in weights if name not in blocks}
            rest_specs = {name: specs[name] for name in rest}
            params = weights | sharding.gather(cast(rest), rest_specs)

        def scaled_loss(params, part, stream=None):
            if frozen_loss is None:
                network = model if stream is None else model.clone(enter=stream.enter)
                loss, sigma = batch_loss(network, params, part, key, edm=edm, mask_ratio=mask_ratio)
            else:
                loss, sigma = frozen_loss(model, params, weights["frozen"], part, key)
            plain = loss
            if levels is not None:
                loss = loss * jnp.exp(-uncertainty.log_loss(levels, sigma))
            return loss.sum() / num_images, (plain, sigma)

        def part_gradients(part):
            stream = streaming.Stream(specs, cast, gradient_dtype) if by_block else None
            grads, (loss, sigma) = jax.grad(scaled_loss, has_aux=True)(params, part, stream)
            if by_block:
                rest = {name: grads[name] for name in rest_specs}
                grads |= scatter(rest, rest_specs, axes=sharding.SPLIT_AXES)
            elif specs is not None:
                grads = scatter(grads, specs)
            return PartGradients(grads, loss, sigma)

        if micro_batches == 1:
            total = part_gradients(batch)
        else:
            # (n, ...) -> (micro_batches, n / micro_batches, ...)
            parts = jax.tree.map(lambda a: a.reshape(micro_batches, -1, *a.shape[1:]), batch)
            total = _accumulate(part_gradients, parts)
        grads = total.grads
        if specs is None:
            return Gradients(grads, optax.tree.norm(grads), total.loss, total.sigma)
        if across and not by_block:
            grads = scatter(grads, specs, axes=("slices",))
        grads = sharding.sum_rest(grads, specs)
        return Gradients(grads, sharding.norm(grads, specs), total.loss, total.sigma)

    def gradients(
        params: Any, batch: Batch, key: PRNGKeyArray, *frozen: Any, levels: Any = None
    ) -> Gradients:
        n = batch["latents"].shape[0]
        if n % (devices * micro_batches):
            raise UserError(
                f"the batch must be a multiple of {devices} devices x {micro_batches} "
                f"micro-batches, found {n} images; change train.batch_size or micro_batches"
            )
        specs = out_specs = None
        if mesh is not None:
            specs, rows = sharding.specs(params, mesh, **layout), sharding.batch_spec(mesh)
            out_specs = Gradients(specs, P(), rows, rows)
        weights = params
        if frozen_loss is not None:
            weights = {"trained": params, "frozen": frozen[0]}
        return sharding.on_each_device(
            functools.partial(device_gradients, specs),
            mesh,
            weights,
            (with_position(batch),),
            (key,) if levels is None else (key, levels),
            cast=cast,
            gathered=not by_block,
            out_specs=out_specs,
            **layout,
        )

    return gradients


def _accumulate(part_gradients: Callable[[Batch], PartGradients], parts: Batch) -> PartGradients:
    """Sums gradients over the first axis of `parts`; loss and sigma one after the other."""
    first = jax.tree.map(lambda a: a[0], parts)
    shapes = jax.eval_shape(part_gradients, first).grads
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)

    def add(total, part):
        found = part_gradients(part)
        total = jax.tree.map(lambda a, g: a + g.astype(jnp.float32), total, found.grads)
        return total, (found.loss, found.sigma)

    # loss and sigma (micro_batches, n / micro_batches)
    grads, (loss, sigma) = jax.lax.scan(add, zeros, parts)
    return PartGradients(grads, loss.reshape(-1), sigma.reshape(-1))
