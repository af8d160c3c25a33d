"""Learning-rate schedules, AdamW with clipping, and the moving average of the weights."""

from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from microdit_jax.errors import UserError
from microdit_jax.sharding import EXPERT_WEIGHTS
from microdit_jax.training.muon import muon


def lenient_promotion() -> AbstractContextManager[None]:
    """Allows Optax's code to mix integers with floats, which strict promotion forbids."""
    return jax.numpy_dtype_promotion("standard")


def learning_rate(
    peak: float,
    *,
    warmup_steps: int = 0,
    decay_steps: int = 0,
    final_ratio: float = 1.0,
    linear_steps: int = 0,
) -> optax.Schedule:
    """Linear warm-up from 0 to `peak`, then constant, or down to `final_ratio * peak`.

    Args:
      peak: learning rate after the warm-up.
      warmup_steps: steps of the warm-up; 0 for none.
      decay_steps: step at which the decay ends, counted from step 0; 0 keeps `peak`.
      final_ratio: the decay's end over its peak.
      linear_steps: last steps of the decay in which the rate falls in a straight line, from `peak`
        before them (MiniCPM, arXiv 2404.06395); 0 for a cosine from the warm-up's end.
    """
    start = 0.0 if warmup_steps else peak
    if decay_steps:
        if decay_steps <= warmup_steps:
            raise UserError(
                f"decay_steps must exceed warmup_steps ({warmup_steps}), found {decay_steps}"
            )
    if linear_steps > (between := max(0, decay_steps - warmup_steps)):
        raise UserError(
            f"linear_steps must be at most the {between} steps from the warm-up's end to "
            f"decay_steps, found {linear_steps}"
        )
    if linear_steps:
        up = optax.linear_schedule(start, peak, max(warmup_steps, 1))
        down = optax.linear_schedule(peak, final_ratio * peak, linear_steps)
        schedule = optax.join_schedules([up, down], [decay_steps - linear_steps])
    elif decay_steps:
        schedule = optax.warmup_cosine_decay_schedule(
            start, peak, warmup_steps, decay_steps, final_ratio * peak
        )
    else:
        schedule = optax.linear_schedule(start, peak, max(warmup_steps, 1))

    def rate(step):
        with lenient_promotion():
            return schedule(step)

    return rate


def adamw(
    schedule: optax.Schedule,
    *,
    weight_decay: float = 0.1,
    clip_norm: float = 0.25,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    expert_multiplier: float = 1.0,
    muon_dtype: Any = None,
) -> optax.GradientTransformation:
    """Clips by the global norm, then AdamW; the decay acts on norms and biases too.

    Args:
      schedule: learning rate by step.
      clip_norm: largest L2 norm of all gradients together.
      expert_multiplier: learning rate of the experts' weights over that of all others; it scales
        their decay too, as a part of the update. The state is the same for every value.
      muon_dtype: type in which Muon orthogonalises hidden matrices; None for AdamW of all weights.
    """
    scaling = _scale_by_learning_rate(schedule)
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    update = optax.chain(adam, optax.add_decayed_weights(weight_decay), scaling)
    if muon_dtype is not None:
        update = muon(scaling, update, weight_decay=weight_decay, compute_dtype=muon_dtype)
    if expert_multiplier != 1:
        update = _scale_experts(update, expert_multiplier)
    return optax.chain(_clip_by_norm(clip_norm), update)


def _scale_by_learning_rate(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_learning_rate`, which also accepts the rate as an argument."""
    scheduled = optax.scale_by_learning_rate(schedule)

    def update_fn(updates, state, params=None, *, rate=None, **_):
        if rate is None:
            return scheduled.update(updates, state, params)
        return optax.scale_by_learning_rate(lambda _: rate).update(updates, state, params)

    return optax.GradientTransformationExtraArgs(scheduled.init, update_fn)


def _clip_by_norm(limit: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm`, which also accepts the gradients' norm as an argument."""

    def update_fn(updates, state, params=None, *, norm=None, **_):
        norm = optax.tree.norm(updates) if norm is None else norm
        clipped = jax.tree.map(
            lambda g: jnp.where(norm < limit, g, (g / norm.astype(g.dtype)) * limit), updates
        )
        return clipped, state

    def init_fn(params):
        del params
        return optax.EmptyState()

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _scale_experts(
    inner: optax.GradientTransformation, multiplier: float
) -> optax.GradientTransformationExtraArgs:
    inner = optax.with_extra_args_support(inner)

    def scale(path, update):
        is_expert = getattr(path[-1], "key", None) in EXPERT_WEIGHTS
        return update * multiplier if is_expert else update

    def update_fn(updates, state, params=None, **extra):
        updates, state = inner.update(updates, state, params, **extra)
        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def apply_gradients(
    optimizer: optax.GradientTransformation,
    grads: Any,
    opt_state: optax.OptState,
    params: Any,
    *,
    norm: Float[Array, ""] | None = None,
    rate: Float[Array, ""] | None = None,
    **layout: Any,
) -> tuple[Any, optax.OptState]:
    """Applies one update; returns the new parameters and the new optimiser state.

    Args:
      norm: L2 norm of all gradients together, for clipping; None to compute it here.
      rate: learning rate; None to compute it here, by the schedule.
      layout: `mesh` and `replicate_below`, for an optimiser that needs whole matrices.
    """
    with lenient_promotion():
        update = optax.with_extra_args_support(optimizer).update
        updates, opt_state = update(grads, opt_state, params, norm=norm, rate=rate, **layout)
    return optax.apply_updates(params, updates), opt_state


def advance_schedule(opt_state: optax.OptState) -> optax.OptState:
    """Returns the state after a step without an update: only the schedule's count moves on."""

    def has_count(node):
        return isinstance(node, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda node: node._replace(count=node.count + 1) if has_count(node) else node,
        opt_state,
        is_leaf=has_count,
    )


def update_ema(
    ema: Any, params: Any, step: Int[Array, ""], *, smoothing: float, start_step: int
) -> Any:
    """Returns smoothing * ema + (1 - smoothing) * params, or params up to `start_step`.

    Args:
      ema, params: trees of the same shapes.
      step: updates done so far, this one included.
    """
    rate = jnp.where(step <= start_step, 1.0, 1.0 - smoothing)
    return jax.tree.map(lambda e, p: e + rate.astype(e.dtype) * (p - e), ema, params)
