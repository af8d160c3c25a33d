"""Self- and cross-attention with layer-normed queries and keys, and the kernels that compute it."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Float32, Int

from microdit_jax.errors import UserError
from microdit_jax.models.layers import Initializer, Precision, SplitLinear, linear, small_normal
from microdit_jax.models.matmuls import fusion_barrier
from microdit_jax.models.norms import normalise

LOOPED_SCORES = 2**20  # float32 scores that `looped` computes at a time: 4 MiB
SPLASH_BLOCK = 128  # splash attention works on blocks of 128 queries by 128 keys

# Kernels that take keys in multiples of a number: cuDNN's backward pass refuses odd lengths, such
# as 77 caption tokens.
KEY_MULTIPLES = {"cudnn": 2}

KeysValues = tuple[Float[Array, "n l h c"], Float[Array, "n l h c"]]


# ------------------------------------------------------------------------------ kernels
def _pad_length(x: Float[Array, "n s h c"], multiple: int) -> Float[Array, "n s_padded h c"]:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0)))


def padded_caption(
    y: Float[Array, "n l d"], implementation: str
) -> tuple[Float[Array, "n l_padded d"], Int[Array, " n"] | None]:
    """Appends the zero rows that an attention kernel asks for: once, not in each block.

    Returns:
      The rows, and the number of an image's that are a caption's; None where nothing was appended.
    """
    extra = -y.shape[1] % KEY_MULTIPLES.get(implementation, 1)
    if not extra:
        return y, None
    lengths = jnp.full(y.shape[0], y.shape[1], jnp.int32)
    return jnp.pad(y, ((0, 0), (0, extra), (0, 0))), lengths


def plain(
    q: Float[Array, "n t h c"],
    k: Float[Array, "n l h c"],
    v: Float[Array, "n l h c"],
    lengths: Int[Array, " n"] | None = None,
) -> Float[Array, "n t h c"]:
    """JAX's own attention, on any platform."""
    # JAX's code mixes bfloat16 with float32, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(
            q, k, v, key_value_seq_lengths=lengths, implementation="xla"
        )


def cudnn(
    q: Float[Array, "n t h c"],
    k: Float[Array, "n l h c"],
    v: Float[Array, "n l h c"],
    lengths: Int[Array, " n"] | None = None,
) -> Float[Array, "n t h c"]:
    """The fused kernel of NVIDIA GPUs, for 16-bit types.

    Args:
      lengths: the keys that count of each image's; None: all.
    Raises:
      UserError: another type.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise UserError(
            f"attention 'cudnn' takes bfloat16 or float16, found {q.dtype}; set "
            "dtype='bfloat16' or attention='xla'"
        )
    t = q.shape[1]
    if k.shape[1] % 2:  # as where tokens attend to each other
        lengths = jnp.full((k.shape[0],), k.shape[1], jnp.int32)  # (n,)
        k, v = _pad_length(k, 2), _pad_length(v, 2)  # (n, l + 1, h, c)
    out = jax.nn.dot_product_attention(
        _pad_length(q, 2), k, v, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return out[:, :t]


def splash(
    q: Float[Array, "n t h c"],
    k: Float[Array, "n l h c"],
    v: Float[Array, "n l h c"],
    *,
    interpret: bool = False,
) -> Float[Array, "n t h c"]:
    """The Pallas kernel of TPUs.

    Args:
      interpret: run in Pallas' interpreter, on any platform, for tests.
    """
    # Imported here: only TPUs (and the interpreter in tests) can run it.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        FullMask,
        MultiHeadMask,
        SegmentIds,
        make_splash_mha_single_device,
    )

    t, l = q.shape[1], k.shape[1]  # noqa: E741
    q, k, v = (_pad_length(x, SPLASH_BLOCK) for x in (q * q.shape[-1] ** -0.5, k, v))
    # Padded keys get a segment of their own; padded queries are cut off below.
    segments = SegmentIds(
        q=jnp.zeros(q.shape[1], jnp.int32),  # (t padded,)
        kv=jnp.asarray(np.arange(k.shape[1]) >= l, jnp.int32),  # (l padded,)
    )
    mask = MultiHeadMask([FullMask((q.shape[1], k.shape[1]))] * q.shape[2])
    kernel = make_splash_mha_single_device(mask, interpret=interpret)
    heads_first = (rearrange(x, "n s h c -> n h s c") for x in (q, k, v))
    out = jax.vmap(kernel, in_axes=(0, 0, 0, None))(*heads_first, segments)  # (n, h, t padded, c)
    return jnp.asarray(rearrange(out, "n h t c -> n t h c"))[:, :t]


def looped(
    q: Float[Array, "n t h c"], k: Float[Array, "n l h c"], v: Float[Array, "n l h c"]
) -> Float[Array, "n t h c"]:
    """Chunks heads so that their scores fit in a CPU's cache, forward and backward.

    It keeps no scores for the backward pass, and runs on any platform.
    """
    n = q.shape[0]
    q = rearrange(q * q.shape[-1] ** -0.5, "n t h c -> (n h) t c")
    k, v = (rearrange(x, "n l h c -> (n h) l c") for x in (k, v))
    return rearrange(_chunked_attention(q, k, v), "(n h) t c -> n t h c", n=n)


def _map_head_chunks(function: Callable, *arrays: Array):
    """Applies `function` to arrays (heads, ., c), LOOPED_SCORES scores (heads, t, l) at a time."""
    heads, t, l = *arrays[0].shape[:2], arrays[1].shape[1]  # noqa: E741
    most = max(1, LOOPED_SCORES // (t * l))
    size = next(size for size in range(min(heads, most), 0, -1) if heads % size == 0)
    if size == heads:
        return function(*arrays)
    # (heads, ., c) -> (chunks, size, ., c)
    chunks = tuple(x.reshape(heads // size, size, *x.shape[1:]) for x in arrays)
    out = jax.lax.map(lambda chunk: function(*chunk), chunks)
    return jax.tree.map(lambda x: x.reshape(heads, *x.shape[2:]), out)


def _head_matmul(x: Array, y: Array, axis_x: int, axis_y: int) -> Array:
    """Contracts one axis of each head's x with one of its y, in float32."""
    dims = (((axis_x,), (axis_y,)), ((0,), (0,)))
    return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)


def _softmax_parts(q: Array, k: Array) -> tuple[Array, Array]:
    """Numerator (m, t, l) and denominator (m, t, 1) of the softmax over keys, in float32."""
    scores = _head_matmul(q, k, 2, 2)  # (m, t, l)
    p = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    return p, p.sum(axis=-1, keepdims=True)


@jax.custom_vjp
def _chunked_attention(
    q: Float[Array, "m t c"], k: Float[Array, "m l c"], v: Float[Array, "m l c"]
):
    """Attention of m heads, with q scaled already; the backward pass recomputes the scores."""

    def chunk(q, k, v):
        p, total = _softmax_parts(q, k)
        out = _head_matmul(p.astype(v.dtype), v, 2, 1)  # (m, t, c)
        return (out / total).astype(v.dtype)

    return _map_head_chunks(chunk, q, k, v)


def _chunked_forward(q, k, v):
    out = _chunked_attention(q, k, v)
    return out, (q, k, v, out)


def _chunked_backward(residuals, g):
    def chunk(q, k, v, out, g):
        p, total = _softmax_parts(q, k)
        p = p / total  # (m, t, l)
        dv = _head_matmul(p.astype(v.dtype), g, 1, 1)  # (m, l, c)
        # Each query's sum of p dp, over keys: equal to g . out, without another (t, l) matrix.
        mean = (g.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
        dscores = (p * (_head_matmul(g, v, 2, 2) - mean)).astype(q.dtype)  # (m, t, l)
        (dscores,) = fusion_barrier(dscores)
        dq, dk = _head_matmul(dscores, k, 2, 1), _head_matmul(dscores, q, 1, 1)
        return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)

    return _map_head_chunks(chunk, *residuals, g)


_chunked_attention.defvjp(_chunked_forward, _chunked_backward)

# Each computes softmax attention with scale 1/sqrt(c), the softmax in float32, and no mask; those
# of KEY_MULTIPLES leave out keys beyond given lengths.
IMPLEMENTATIONS = {"xla": plain, "looped": looped, "cudnn": cudnn, "splash": splash}


# ------------------------------------------------------------------------------ modules
@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """Options that all attention layers of one network share.

    Attributes:
      head_dim: width c of a head.
      use_bias: biases in the projections.
      eps: epsilon of the norm of queries and keys.
      implementation: a name of IMPLEMENTATIONS.
      init_std: standard deviation of the projections of queries, keys and values at the start.
      precision: types of matmuls and parameters.
    """

    head_dim: int
    use_bias: bool
    eps: float
    implementation: str
    init_std: float
    precision: Precision


class _Attention(nn.Module):
    """Base of both attentions: projections, the norm of queries and keys, the kernel.

    Attributes:
      hidden: width h * c of queries, keys and values.
      dim: width d of the output.
      out_init: initialiser of the output projection.
    """

    options: AttentionOptions
    hidden: int
    dim: int
    out_init: Initializer

    def projection(self, features: int, init: Initializer) -> nn.Dense:
        return linear(
            features,
            self.options.precision,
            use_bias=self.options.use_bias,
            kernel_init=init,
        )

    def split_projection(self, parts: int, init: Initializer) -> SplitLinear:
        options = self.options
        return SplitLinear(parts, self.hidden, options.precision, options.use_bias, init)

    def split_heads(self, x: Float[Array, "n s f"]) -> Float[Array, "n s h c"]:
        return rearrange(x, "n s (h c) -> n s h c", c=self.options.head_dim)

    def normed_heads(self, x: Float[Array, "n s f"]) -> Float[Array, "n s h c"]:
        """Non-affine layer norm over the full hidden width, then the split into heads."""
        return self.split_heads(normalise(x, self.options.eps))

    def attend(
        self,
        q: Float[Array, "n t h c"],
        keys_values: KeysValues,
        lengths: Int[Array, " n"] | None = None,
    ) -> Float[Array, "n t f"]:
        kernel = IMPLEMENTATIONS[self.options.implementation]
        given = () if lengths is None else (lengths,)
        out = kernel(q, *keys_values, *given)
        return rearrange(out, "n t h c -> n t (h c)")


class SelfAttention(_Attention):
    """Attention among all tokens of a sequence; q, k, v from one projection, in that order."""

    def setup(self):
        self.qkv = self.split_projection(3, small_normal(self.options.init_std))
        self.proj = self.projection(self.dim, self.out_init)

    def __call__(self, x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
        q, k, v = self.qkv(x)  # each (n, t, h * c)
        q, k, v = self.normed_heads(q), self.normed_heads(k), self.split_heads(v)
        return self.proj(self.attend(q, (k, v)))


class CrossAttention(_Attention):
    """Image tokens attend to caption tokens, whose keys and values can be computed ahead."""

    def setup(self):
        init = small_normal(self.options.init_std)
        self.q_linear = self.split_projection(1, init)
        self.kv_linear = self.split_projection(2, init)
        self.proj = self.projection(self.dim, self.out_init)

    def keys_values(self, y: Float[Array, "n l d"]) -> KeysValues:
        """The caption's normed keys and its values, each (n, l, h, c)."""
        k, v = self.kv_linear(y)  # each (n, l, h * c)
        return self.normed_heads(k), self.split_heads(v)

    def __call__(
        self,
        x: Float[Array, "n t d"],
        keys_values: KeysValues,
        lengths: Int[Array, " n"] | None = None,
        scale: Float32[Array, " d"] | None = None,
    ) -> Float[Array, "n t d"]:
        """Attention of x, or of x times `scale`, to the caption."""
        (q,) = self.q_linear(x, scale)
        return self.proj(self.attend(self.normed_heads(q), keys_values, lengths))
