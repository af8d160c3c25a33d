"""Functions with backward passes of their own, in place of autodiff's.

JAX cannot differentiate such a function in forward mode.
"""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, Shaped


def with_backward(
    forward: Callable[..., tuple[Any, Any]],
    backward: Callable[..., Any],
    *,
    static: tuple[int, ...] = (),
) -> Callable[[Callable], Callable]:
    """Decorates a function with its own backward pass, as `jax.custom_vjp` takes it.

    Args:
      static: positions of arguments that are no arrays.
    """

    def decorate(function: Callable) -> Callable:
        custom = jax.custom_vjp(function, nondiff_argnums=static)
        custom.defvjp(forward, backward)
        return custom

    return decorate


def as_kept(*residuals: Shaped[Array, "..."]) -> tuple[Shaped[Array, "..."], ...]:
    """Returns what a forward pass kept, so that the backward pass reads just that.

    Without it XLA takes a rounded array for the unrounded one, which it then keeps instead, or
    computes again from yet larger arrays.
    """
    return jax.lax.optimization_barrier(residuals)


def _narrow_backward(dtype: str, _: None, g: Array) -> tuple[Array]:
    (narrow,) = as_kept(g.astype(dtype))
    return (narrow.astype(g.dtype),)


@with_backward(lambda x, dtype: (x, None), _narrow_backward, static=(1,))
def narrow_gradient(x: Float[Array, "..."], dtype: str) -> Float[Array, "..."]:
    """Returns x, whose gradient is rounded to `dtype` on its way through memory."""
    return x
