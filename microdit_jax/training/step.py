"""TrainState and the pure functions that update it, for training, compilation and benchmarks.

  mesh = sharding.make_mesh(data=-1, fsdp=8, expert=1)
  state = sharded_init(model, optimizer, key, mesh, with_ema=True)
  step = jax.jit(make_train_step(model, optimizer, schedule, ..., mesh=mesh), donate_argnums=0)
  state, metrics = step(state, sharding.put_batch(batch, mesh))

Without a mesh the same functions run on one device. All randomness of an image is a function of
(seed, step, its position in the batch), so neither the mesh nor the number of micro-batches changes
it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

from microdit_jax import sharding
from microdit_jax.diffusion import EdmConfig
from microdit_jax.errors import UserError
from microdit_jax.models import dit
from microdit_jax.models.dit import DiT
from microdit_jax.training import optim
from microdit_jax.training.loss import Batch, batch_loss, with_position

Metrics = dict[str, Any]
# Like `loss.batch_loss`, with frozen weights behind the trained ones
FrozenLoss = Callable[..., tuple[Float[Array, " n"], Float[Array, " n"]]]


class TrainState(flax.struct.PyTreeNode):
    """All that training carries from step to step.

    Trees of shapes, shardings and names take the same form, hence Any.

    Attributes:
      step: steps done, int32 ().
      params: the weights.
      opt_state: the optimiser's state.
      ema: moving average of the weights, or None where none is kept.
      skipped: updates skipped in a row because loss or gradient was not finite, int32 ().
    """

    step: Any
    params: Any
    opt_state: optax.OptState
    ema: Any | None
    skipped: Any

    @classmethod
    def create(
        cls, params: Any, optimizer: optax.GradientTransformation, *, with_ema: bool
    ) -> "TrainState":
        """The state at step 0, for these weights."""
        # Copies, so that donating the state never donates one buffer twice.
        ema = jax.tree.map(jnp.copy, params) if with_ema else None
        zero = jnp.zeros((), jnp.int32)
        return cls(zero, params, optimizer.init(params), ema, jnp.copy(zero))


# ------------------------------------------------------------------------------ initialisation
def init_state(
    model: DiT, optimizer: optax.GradientTransformation, key: PRNGKeyArray, *, with_ema: bool
) -> TrainState:
    """The state before the first step. Pure: jit it, or take its shapes with `jax.eval_shape`."""
    return TrainState.create(dit.init_params(model.config, key), optimizer, with_ema=with_ema)


def abstract_state(
    model: DiT,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
    *,
    with_ema: bool,
    replicate_below: int = sharding.REPLICATE_BELOW,
) -> TrainState:
    """Shapes, types and shardings of the state, without any array: to restore or compile into."""
    init = functools.partial(init_state, model, optimizer, with_ema=with_ema)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return sharding.with_shardings(shapes, mesh, replicate_below=replicate_below)


def sharded_init(
    model: DiT,
    optimizer: optax.GradientTransformation,
    key: PRNGKeyArray,
    mesh: Mesh,
    *,
    with_ema: bool,
    replicate_below: int = sharding.REPLICATE_BELOW,
) -> TrainState:
    """`init_state`, with each device computing its own shards: none ever holds a whole copy."""
    target = abstract_state(
        model, optimizer, mesh, with_ema=with_ema, replicate_below=replicate_below
    )
    init = functools.partial(init_state, model, optimizer, with_ema=with_ema)
    return jax.jit(init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, target))(key)


# ------------------------------------------------------------------------------ gradients
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
    replicate_below: int = sharding.REPLICATE_BELOW,
    frozen_loss: FrozenLoss | None = None,
) -> Callable[..., Gradients]:
    """Makes the function (params, batch, key) -> Gradients, over the mesh and micro-batches.

    With a loss of frozen weights, the function takes one more argument, those weights, sharded like
    all weights.

    Weights are all-gathered once a step, matrices in the type that the network computes in (XL/2 in
    bfloat16: 2.7 GB), and stay for all micro-batches. Each micro-batch's gradients are summed into
    float32 shards at once, so that only one backward pass's gradients are ever whole. Sums over
    axes that a weight is not split over wait for the last micro-batch.

    Raises:
      UserError: at the first call, a batch that does not divide.
    """
    devices = 1 if mesh is None else mesh.size

    def device_gradients(specs, weights, batch, key):
        """Gradients on one device, of its own images; specs is None without a mesh."""
        num_images = batch["latents"].shape[0] * devices
        params = weights if frozen_loss is None else weights["trained"]

        def scaled_loss(params, part):
            if frozen_loss is None:
                loss, sigma = batch_loss(model, params, part, key, edm=edm, mask_ratio=mask_ratio)
            else:
                loss, sigma = frozen_loss(model, params, weights["frozen"], part, key)
            return loss.sum() / num_images, (loss, sigma)

        def part_gradients(part):
            grads, (loss, sigma) = jax.grad(scaled_loss, has_aux=True)(params, part)
            if specs is not None:
                grads = sharding.scatter_sum(grads, specs)
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
        grads = sharding.sum_rest(grads, specs)
        return Gradients(grads, sharding.norm(grads, specs), total.loss, total.sigma)

    def gradients(params: Any, batch: Batch, key: PRNGKeyArray, *frozen: Any) -> Gradients:
        n = batch["latents"].shape[0]
        if n % (devices * micro_batches):
            raise UserError(
                f"the batch must be a multiple of {devices} devices x {micro_batches} "
                f"micro-batches, found {n} images; change train.batch_size or micro_batches"
            )
        specs = None
        if mesh is not None:
            specs = sharding.specs(params, mesh, replicate_below=replicate_below)
        weights = params
        if frozen_loss is not None:
            weights = {"trained": params, "frozen": frozen[0]}
        return sharding.on_each_device(
            functools.partial(device_gradients, specs),
            mesh,
            weights,
            (with_position(batch),),
            (key,),
            cast=lambda shards: dit.cast_matrices(shards, model.config),
            out_specs=Gradients(specs, P(), sharding.BATCH, sharding.BATCH),
            replicate_below=replicate_below,
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


# ------------------------------------------------------------------------------ steps
def make_train_step(
    model: DiT,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    edm: EdmConfig,
    mask_ratio: float,
    seed: int,
    ema_smoothing: float,
    ema_start_step: int,
    mesh: Mesh | AbstractMesh | None = None,
    micro_batches: int = 1,
    module_grad_norms: bool = False,
    replicate_below: int = sharding.REPLICATE_BELOW,
    frozen_loss: FrozenLoss | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Makes one update, a pure function of state and batch whose randomness is f(seed, step).

    If the loss or the gradient's norm is not finite, weights, optimiser and average stay as they
    were, and only the step (with it the schedule) moves on. Both are sums over all devices, so all
    hosts decide alike.

    Args:
      mesh: devices of state and batch; None for one device.
      micro_batches: parts into which a device's batch is split; the result does not depend on it.
      module_grad_norms: also report the gradient's norm of each part of the network.
      frozen_loss: with weights, a teacher's or a base's, that are the function's third argument.
    Returns:
      A function to jit, with the state donated. Its metrics: "loss", "grad_norm" (before clipping),
      "learning_rate", float32 (); "skipped", 1 if the update was, and "skipped_in_a_row", int32 ();
      "image_loss", "image_sigma" (n,) in the batch's order, sharded like it; if asked for,
      "module_grad_norm", {module: float32 ()}.
    """
    gradients = make_gradients(
        model,
        edm=edm,
        mask_ratio=mask_ratio,
        mesh=mesh,
        micro_batches=micro_batches,
        replicate_below=replicate_below,
        frozen_loss=frozen_loss,
    )

    layout = {"mesh": mesh, "replicate_below": replicate_below}

    def train_step(state: TrainState, batch: Batch, *frozen: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, grad_norm, image_loss, image_sigma = gradients(state.params, batch, key, *frozen)
        loss = image_loss.mean()
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        step = state.step + 1

        def update(params, opt_state, ema):
            params, opt_state = optim.apply_gradients(
                optimizer, grads, opt_state, params, norm=grad_norm, **layout
            )
            if ema is not None:
                ema = optim.update_ema(
                    ema, params, step, smoothing=ema_smoothing, start_step=ema_start_step
                )
            return params, opt_state, ema

        def keep(params, opt_state, ema):
            return params, optim.advance_schedule(opt_state), ema

        params, opt_state, ema = jax.lax.cond(
            finite, update, keep, state.params, state.opt_state, state.ema
        )
        skipped = jnp.where(finite, 0, state.skipped + 1)
        state = TrainState(step, params, opt_state, ema, skipped)
        if mesh is not None:
            shardings = sharding.shardings(state, mesh, replicate_below=replicate_below)
            state = jax.lax.with_sharding_constraint(state, shardings)
        metrics: Metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(schedule(step - 1), jnp.float32),
            "skipped": 1 - finite.astype(jnp.int32),
            "skipped_in_a_row": skipped,
            "image_loss": image_loss,
            "image_sigma": image_sigma,
        }
        if module_grad_norms:
            metrics["module_grad_norm"] = {k: optax.tree.norm(g) for k, g in grads.items()}
        return state, metrics

    return train_step


def make_eval_step(
    model: DiT,
    *,
    edm: EdmConfig,
    seed: int,
    mesh: Mesh | AbstractMesh | None = None,
    replicate_below: int = sharding.REPLICATE_BELOW,
) -> Callable[[Any, Batch], tuple[Float[Array, " n"], Float[Array, " n"]]]:
    """Makes the unmasked loss: (params, batch) -> loss and sigma of each image, each (n,).

    The noise is a function of the seed, the batch's "draw" and each image's position.
    """

    def device_loss(params, batch, key):
        return batch_loss(model, params, batch, key, edm=edm, mask_ratio=0.0)

    def eval_step(params: Any, batch: Batch) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        key = jax.random.fold_in(jax.random.key(seed), batch["draw"])
        rows = with_position({name: value for name, value in batch.items() if name != "draw"})
        return sharding.on_each_device(
            device_loss,
            mesh,
            params,
            (rows,),
            (key,),
            cast=lambda shards: dit.cast_matrices(shards, model.config),
            replicate_below=replicate_below,
        )

    return eval_step
