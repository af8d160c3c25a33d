"""TrainState and the pure functions that update it, for training, compilation and benchmarks.

  mesh = sharding.make_mesh(data=-1, fsdp=8, expert=1)
  state = sharded_init(model, optimizer, key, mesh, with_ema=True)
  step = jax.jit(make_train_step(model, optimizer, schedule, ..., mesh=mesh), donate_argnums=0)
  state, metrics = step(state, sharding.put_batch(batch, mesh))

Without a mesh the same functions run on one device. All randomness of an image is a function of
(seed, step, its position in the batch), whatever the mesh and the number of micro-batches.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from microdit_jax import sharding
from microdit_jax.diffusion import EdmConfig
from microdit_jax.models import dit
from microdit_jax.models.dit import DiT
from microdit_jax.training import averages, optim, uncertainty
from microdit_jax.training.gradients import FrozenLoss, Gradients, make_gradients
from microdit_jax.training.loss import Batch, batch_loss, with_position

__all__ = [
    "Gradients", "Metrics", "TrainState", "abstract_state", "init_state", "make_eval_step",
    "make_gradients", "make_train_step", "sharded_init",
]  # fmt: skip

Metrics = dict[str, Any]


class TrainState(flax.struct.PyTreeNode):
    """All that training carries from step to step.

    Trees of shapes, shardings and names take the same form, hence Any.

    Attributes:
      step: steps done, int32 ().
      params: the weights.
      opt_state: the optimiser's state.
      ema: moving average of the weights, or None where none is kept.
      skipped: updates skipped in a row because loss or gradient was not finite, int32 ().
      averages: averages by a power function (training.averages), or None where none are tracked.
      uncertainty: of the loss by noise level (training.uncertainty), or None where none is learned.
    """

    step: Any
    params: Any
    opt_state: optax.OptState
    ema: Any | None
    skipped: Any
    averages: Any | None = None
    uncertainty: Any | None = None

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
    gradient_dtype: str = "float32",
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
      gradient_dtype: type that gradients travel in between devices; they are summed in float32.
      module_grad_norms: also report the gradient's norm of each part of the network.
      frozen_loss: with weights, a teacher's or a base's, that are the function's third argument.
    Returns:
      A function to jit, with the state donated. Its metrics: "loss", "grad_norm" (before clipping),
      "learning_rate", float32 (); "skipped", 1 if the update was, and "skipped_in_a_row", int32 ();
      "image_loss", "image_sigma" (n,) in the batch's order; if asked for, "module_grad_norm",
      {module: float32 ()}.
    """
    gradients = make_gradients(
        model,
        edm=edm,
        mask_ratio=mask_ratio,
        mesh=mesh,
        micro_batches=micro_batches,
        gradient_dtype=gradient_dtype,
        replicate_below=replicate_below,
        frozen_loss=frozen_loss,
    )

    layout = {"mesh": mesh, "replicate_below": replicate_below}

    def train_step(state: TrainState, batch: Batch, *frozen: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        known = state.uncertainty
        counting = {} if known is None else {"levels": known.weights}
        grads, grad_norm, image_loss, image_sigma = gradients(
            state.params, batch, key, *frozen, **counting
        )
        loss = image_loss.mean()
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        step = state.step + 1
        # Here and not inside the condition, where XLA would compute it again for each weight.
        rate = jnp.asarray(schedule(state.step), jnp.float32)

        def update(params, opt_state, ema):
            params, opt_state = optim.apply_gradients(
                optimizer, grads, opt_state, params, norm=grad_norm, rate=rate, **layout
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
        tracked = averages.advance(state.averages, params, step)
        if known is not None:
            known = uncertainty.advance(known, image_loss, image_sigma, rate=rate, finite=finite)
        state = TrainState(step, params, opt_state, ema, skipped, tracked, known)
        if mesh is not None:
            shardings = sharding.shardings(state, mesh, replicate_below=replicate_below)
            state = jax.lax.with_sharding_constraint(state, shardings)
        metrics: Metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": rate,
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
