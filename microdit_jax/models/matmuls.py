"""Matmuls whose backward pass suits XLA on CPUs; on other platforms they equal plain autodiff's.

The gradient of a weight is a matmul with the layer's input transposed. XLA's CPU backend fuses that
transpose with the computation of the input, so that norm, modulation or GELU run a second time, one
strided element after another (0.31 s of a 1.3 s mixer block with experts; docs/performance.md). An
optimization barrier on both operands prevents the fusion.

JAX cannot differentiate a function with a backward pass of its own in forward mode; what calls
`jax.jvp` on a network traces it within `forward_mode`.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
from jaxtyping import Array, Float, Shaped

_FORWARD_MODE = contextvars.ContextVar("forward mode", default=False)


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """Traces the matmuls within it as plain ones, which `jax.jvp` differentiates."""
    token = _FORWARD_MODE.set(True)
    try:
        yield
    finally:
        _FORWARD_MODE.reset(token)


def _identity(*operands: Array) -> tuple[Array, ...]:
    return operands


def fusion_barrier(*operands: Shaped[Array, "..."]) -> tuple[Shaped[Array, "..."], ...]:
    """Returns the operands; on CPUs, what consumes them does not compute them a second time."""
    return jax.lax.platform_dependent(
        *operands,
        cpu=lambda *operands: jax.lax.optimization_barrier(operands),
        default=_identity,
    )


def matmul(x: Float[Array, "*b d"], w: Float[Array, "d f"]) -> Float[Array, "*b f"]:
    """Returns x w, contracted over the last axis of x."""
    return _plain_matmul(x, w) if _FORWARD_MODE.get() else _matmul(x, w)


def _plain_matmul(x: Array, w: Array) -> Array:
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))


_matmul = jax.custom_vjp(_plain_matmul)


def _matmul_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _matmul(x, w), (x, w)


def _matmul_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = residuals
    x, g = fusion_barrier(x, g)
    rows = tuple(range(x.ndim - 1))
    dx = jax.lax.dot_general(g, w, (((g.ndim - 1,), (1,)), ((), ())))  # (*b, d)
    dw = jax.lax.dot_general(x, g, ((rows, rows), ((), ())))  # (d, f)
    return dx, dw


_matmul.defvjp(_matmul_forward, _matmul_backward)


def dot_general(
    x: Float[Array, "*b d"],
    w: Float[Array, "d f"],
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    **_: Any,
) -> Float[Array, "*b f"]:
    """Computes `matmul` behind the signature that `flax.linen.Dense` calls."""
    assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ()))
    assert precision is None and preferred_element_type is None
    return matmul(x, w)


def _batched(x: Array, w: Array, x_axis: int, w_axis: int) -> Array:
    return jax.lax.dot_general(x, w, (((x_axis,), (w_axis,)), ((0,), (0,))))


def batched_matmul(x: Float[Array, "e m d"], w: Float[Array, "e d f"]) -> Float[Array, "e m f"]:
    """Returns x[e] w[e] for each e."""
    return _plain_batched_matmul(x, w) if _FORWARD_MODE.get() else _batched_matmul(x, w)


def _plain_batched_matmul(x: Array, w: Array) -> Array:
    return _batched(x, w, 2, 1)


_batched_matmul = jax.custom_vjp(_plain_batched_matmul)


def _batched_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _batched_matmul(x, w), (x, w)


def _batched_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = residuals
    x, g = fusion_barrier(x, g)
    return _batched(g, w, 2, 2), _batched(x, g, 1, 1)  # (e, m, d), (e, d, f)


_batched_matmul.defvjp(_batched_forward, _batched_backward)
