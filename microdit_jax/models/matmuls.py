"""Matmuls that round a weight to the type of their input, with backward passes of their own.

A weight in float32 gets its gradient in float32: the matmul that computes it adds in float32, and
to round its result would only move it through memory twice more.

The gradient of a weight is a matmul with the layer's input transposed. XLA's CPU backend fuses that
transpose with the computation of the input, so that norm, modulation or GELU run a second time, one
strided element after another (0.31 s of a 1.3 s mixer block with experts; docs/notebook.md). An
optimization barrier on both operands prevents the fusion.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Shaped

from microdit_jax.models.derivatives import with_backward

RESULT = "matmul"  # name of results, for `keeps_results`


def keeps_results(primitive: Any, *args: Any, **params: Any) -> bool:
    """Rematerialization policy: keeps results of weight matrices and of fused attention kernels.

    The backward pass computes the rest again, which is cheap elementwise work, and the scores of
    attention in JAX's own operations.
    """
    named = jax.checkpoint_policies.save_only_these_names(RESULT)
    return "attention_fwd" in primitive.name or named(primitive, *args, **params)


def named(result: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Names a matmul's result, which `keeps_results` keeps."""
    return checkpoint_name(result, RESULT)


def _identity(*operands: Array) -> tuple[Array, ...]:
    return operands


def fusion_barrier(*operands: Shaped[Array, "..."]) -> tuple[Shaped[Array, "..."], ...]:
    """Returns the operands; on CPUs, what consumes them does not compute them a second time."""
    return jax.lax.platform_dependent(
        *operands,
        cpu=lambda *operands: jax.lax.optimization_barrier(operands),
        default=_identity,
    )


def _matmul_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    narrow = w.astype(x.dtype)
    return named(jax.lax.dot_general(x, narrow, (((x.ndim - 1,), (0,)), ((), ())))), (x, w)


def _matmul_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = residuals
    x, g = fusion_barrier(x, g)
    rows = tuple(range(x.ndim - 1))
    dx = jax.lax.dot_general(g, w.astype(x.dtype), (((g.ndim - 1,), (1,)), ((), ())))  # (*b, d)
    dw = jax.lax.dot_general(x, g, ((rows, rows), ((), ())), preferred_element_type=w.dtype)
    return dx, dw  # the latter (d, f)


@with_backward(_matmul_forward, _matmul_backward)
def matmul(x: Float[Array, "*b d"], w: Float[Array, "d f"]) -> Float[Array, "*b f"]:
    """Returns x w, contracted over the last axis of x, in its type."""
    return _matmul_forward(x, w)[0]


def _parts_forward(x: Array, w: Array, parts: int) -> tuple[tuple[Array, ...], tuple[Array, Array]]:
    if x.dtype == jnp.float32:  # where kernels for other widths sum in another order
        return tuple(jnp.split(_matmul_forward(x, w)[0], parts, axis=-1)), (x, w)
    return tuple(_matmul_forward(x, part)[0] for part in jnp.split(w, parts, axis=1)), (x, w)


def _parts_backward(
    parts: int, residuals: tuple[Array, Array], gradients: tuple[Array, ...]
) -> tuple[Array, Array]:
    return _matmul_backward(residuals, jnp.concatenate(gradients, axis=-1))


@with_backward(_parts_forward, _parts_backward, static=(2,))
def matmul_parts(
    x: Float[Array, "*b d"], w: Float[Array, "d f"], parts: int
) -> tuple[Float[Array, "*b f_part"], ...]:
    """Returns x w in equal parts of its columns, in 16 bits by a matmul for each.

    To cut them out of one result would move all of it through memory once more. Their gradients
    are put together for one matmul, as cutting them apart is free there. In float32 it is one
    matmul, so that samples stay what they were to the bit.
    """
    return _parts_forward(x, w, parts)[0]


def matmul_pair(
    x: Float[Array, "*b d"], w1: Float[Array, "d f"], w2: Float[Array, "d f"]
) -> Float[Array, "*b f_both"]:
    """Returns x w1 and x w2 beside each other, by one matmul: for kernels that read both at once.

    Forward x, and backward its gradient, are then read and written once for both.
    """
    return matmul(x, jnp.concatenate([w1, w2], axis=1))


def _rounded(w: Array, dtype: Any) -> Array:
    """Returns w in float32, as `dtype` keeps it; XLA would leave out a cast and its inverse."""
    form = jnp.finfo(dtype)
    return jax.lax.reduce_precision(w.astype(jnp.float32), form.nexp, form.nmant)


def _scaled_forward(w: Array, scale: Array, dtype: str) -> tuple[Array, tuple[Array, Array]]:
    return scale[:, None] * _rounded(w, dtype), (w, scale)


def _scaled_backward(dtype: str, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    w, scale = residuals
    return (scale[:, None] * g).astype(w.dtype), (_rounded(w, dtype) * g).sum(axis=1)


@with_backward(_scaled_forward, _scaled_backward, static=(2,))
def scaled_matrix(
    w: Float[Array, "d f"], scale: Float32[Array, " d"], dtype: str
) -> Float32[Array, "d f"]:
    """Returns the rows of w times `scale`, w rounded to `dtype` first, as where it came so."""
    return _scaled_forward(w, scale, dtype)[0]


def narrow_inputs(
    *arrays: Float[Array, "..."] | None, dtype: Any = None, inexact: bool = True
) -> list[Float[Array, "..."] | None]:
    """Casts the input and the bias of `flax.linen.Dense`; `matmul` rounds the kernel."""
    x, kernel, bias = arrays
    assert x is not None and inexact
    return [x.astype(dtype), kernel, None if bias is None else bias.astype(dtype)]


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


def _batched(x: Array, w: Array, x_axis: int, w_axis: int, dtype: Any = None) -> Array:
    dims = (((x_axis,), (w_axis,)), ((0,), (0,)))
    return jax.lax.dot_general(x, w, dims, preferred_element_type=dtype)


def _batched_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return named(_batched(x, w.astype(x.dtype), 2, 1)), (x, w)


def _batched_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = residuals
    x, g = fusion_barrier(x, g)
    dx = _batched(g, w.astype(x.dtype), 2, 2)  # (e, m, d)
    return dx, _batched(x, g, 1, 1, w.dtype)  # (e, d, f)


@with_backward(_batched_forward, _batched_backward)
def batched_matmul(x: Float[Array, "e m d"], w: Float[Array, "e d f"]) -> Float[Array, "e m f"]:
    """Returns x[e] w[e] for each e, in the type of x."""
    return _batched_forward(x, w)[0]
