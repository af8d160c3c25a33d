"""Matrix products whose backward pass suits XLA on CPUs; elsewhere they are what autodiff makes.

A weight's gradient is a product with its input transposed. XLA's CPU backend fuses that transpose
with whatever computed the input: norm, modulation or GELU are computed once more, one strided
element after the other (0.31 s of a 1.3 s mixer block with experts; docs/performance.md). A barrier
on the operands stops it.
"""

from typing import Any

import jax
from jaxtyping import Array, Float, Shaped


def _identity(*operands: Array) -> tuple[Array, ...]:
    return operands


def held(*operands: Shaped[Array, "..."]) -> tuple[Shaped[Array, "..."], ...]:
    """The same arrays; on a CPU their computation is not repeated inside what follows."""
    return jax.lax.platform_dependent(
        *operands,
        cpu=lambda *operands: jax.lax.optimization_barrier(operands),
        default=_identity,
    )


@jax.custom_vjp
def product(x: Float[Array, "*b d"], w: Float[Array, "d f"]) -> Float[Array, "*b f"]:
    """x w over the last axis of x."""
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))


def _product_backward(residuals, g):
    x, w = residuals
    x, g = held(x, g)
    rows = tuple(range(x.ndim - 1))
    dx = jax.lax.dot_general(g, w, (((g.ndim - 1,), (1,)), ((), ())))
    return dx, jax.lax.dot_general(x, g, ((rows, rows), ((), ())))


product.defvjp(lambda x, w: (product(x, w), (x, w)), _product_backward)


def dot_general(
    x: Float[Array, "*b d"],
    w: Float[Array, "d f"],
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    **_: Any,
) -> Float[Array, "*b f"]:
    """What `flax.linen.Dense` calls for its product: `product`."""
    assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ()))
    assert precision is None and preferred_element_type is None
    return product(x, w)


def _batched(x: Array, w: Array, x_axis: int, w_axis: int) -> Array:
    return jax.lax.dot_general(x, w, (((x_axis,), (w_axis,)), ((0,), (0,))))


@jax.custom_vjp
def products(x: Float[Array, "e m d"], w: Float[Array, "e d f"]) -> Float[Array, "e m f"]:
    """x[e] w[e] for each e."""
    return _batched(x, w, 2, 1)


def _products_backward(residuals, g):
    x, w = residuals
    x, g = held(x, g)
    return _batched(g, w, 2, 2), _batched(x, g, 1, 1)


products.defvjp(lambda x, w: (products(x, w), (x, w)), _products_backward)
