"""Deferred patch masking, as a pure function of uniform noise."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from microdit_jax.errors import UserError
from microdit_jax.models.derivatives import with_backward


class Mask(NamedTuple):
    """The tokens that are kept, their order, and the way back.

    Attributes:
      ids_keep: kept tokens in shuffled order, int32.
      ids_restore: each token's position in the shuffled order, int32.
      dropped: 1 where the token is dropped, float32.
    """

    ids_keep: Int[Array, "n t_kept"]
    ids_restore: Int[Array, "n t"]
    dropped: Float[Array, "n t"]


def num_kept(t: int, mask_ratio: float) -> int:
    """Number of tokens kept of t: int(t (1 - mask_ratio)).

    Raises:
      UserError: the ratio is outside [0, 1), or no token would be left.
    """
    if not 0 <= mask_ratio < 1:
        raise UserError(f"mask_ratio must be in [0, 1), found {mask_ratio}; the paper's is 0.75")
    kept = int(t * (1 - mask_ratio))
    if kept < 1:
        raise UserError(f"mask_ratio {mask_ratio} keeps none of {t} tokens; lower it")
    return kept


def uniform_noise(key: PRNGKeyArray, n: int, t: int) -> Float[Array, "n t"]:
    """Samples the uniform noise in [0, 1) that decides a mask, float32."""
    return jax.random.uniform(key, (n, t), jnp.float32)


def make_mask(noise: Float[Array, "n t"], mask_ratio: float) -> Mask:
    """Keeps the tokens with the smallest noise (MAE's random masking, He et al. 2021).

    Args:
      noise: (n, t), uniform.
      mask_ratio: the share dropped, in [0, 1); static.
    """
    kept = num_kept(noise.shape[1], mask_ratio)
    shuffled = jnp.argsort(noise, axis=1)  # (n, t)
    ids_restore = jnp.argsort(shuffled, axis=1)  # (n, t)
    dropped = (ids_restore >= kept).astype(jnp.float32)
    return Mask(shuffled[:, :kept], ids_restore, dropped)


def _rows(x: Array, index: Array) -> Array:
    return jnp.take_along_axis(x, index[:, :, None], axis=1, mode="promise_in_bounds")


def _restored(x: Array, ids_restore: Array) -> Array:
    n, kept, d = x.shape
    t = ids_restore.shape[1]
    padded = jnp.concatenate([x, jnp.zeros((n, t - kept, d), x.dtype)], axis=1)  # (n, t, d)
    return _rows(padded, ids_restore)


@with_backward(
    lambda x, ids_keep, ids_restore: (_rows(x, ids_keep), ids_restore),
    lambda ids_restore, g: (_restored(g, ids_restore), None, None),
)
def _kept(x: Array, ids_keep: Array, ids_restore: Array) -> Array:
    """Gathers rows; the backward pass gathers too, where autodiff's scatters in float32."""
    return _rows(x, ids_keep)


def mask_if_any(noise: Float[Array, "n t"] | None, t: int, mask_ratio: float) -> Mask | None:
    """Returns the mask of t tokens, or None where the ratio drops none.

    Raises:
      UserError: tokens are to be dropped, and there is no noise to decide which.
    """
    if num_kept(t, mask_ratio) == t:
        return None
    if noise is None:
        raise UserError(
            f"mask_ratio {mask_ratio} needs mask_noise (n, {t}); make it with "
            "microdit_jax.models.masking.uniform_noise(key, n, t)"
        )
    return make_mask(noise, mask_ratio)


def drop_tokens(x: Float[Array, "n t d"], mask: Mask) -> Float[Array, "n t_kept d"]:
    """Gathers the kept tokens, in shuffled order."""
    return _kept(x, mask.ids_keep, mask.ids_restore)


def restore_tokens(x: Float[Array, "n t_kept d"], mask: Mask) -> Float[Array, "n t d"]:
    """Undoes `drop_tokens`; dropped tokens become zero (the reference's `mask_token`)."""
    return _restored(x, mask.ids_restore)


def rejoin_tokens(
    x: Float[Array, "n t_kept d"], mask: Mask, routed: Float[Array, "n t d"]
) -> Float[Array, "n t d"]:
    """Undoes `drop_tokens`, with the dropped tokens out of `routed` (TREAD, arXiv 2501.04765)."""
    return jnp.where(mask.dropped[:, :, None] > 0, routed, restore_tokens(x, mask))
