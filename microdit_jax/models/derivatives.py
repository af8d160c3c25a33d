"""Functions with backward passes of their own, in place of autodiff's.

JAX cannot differentiate such a function in forward mode.
"""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Shaped


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
