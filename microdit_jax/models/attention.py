"""Self- and cross-attention with layer-normed queries and keys, and the choice of kernel."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from microdit_jax.errors import UserError
from microdit_jax.models.layers import Dtype, Initializer, Linear, normalise, small_normal, xavier
from microdit_jax.models.products import held

IMPLEMENTATIONS = ("xla", "looped", "cudnn", "splash")
LOOPED_SCORES = 2**20  # float32 scores computed at a time: 4 MiB
SPLASH_BLOCK = 128  # splash attention works on blocks of 128 queries by 128 keys

KeysValues = tuple[Float[Array, "n l h c"], Float[Array, "n l h c"]]


def _pad_length(x: Float[Array, "n s h c"], multiple: int) -> Float[Array, "n s_padded h c"]:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0)))


def _cudnn(q, k, v):
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise UserError(
            f"attention 'cudnn' takes bfloat16 or float16, found {q.dtype}; set "
            "dtype='bfloat16' or attention='xla'"
        )
    t, lengths = q.shape[1], None
    # cuDNN's backward pass refuses odd lengths, such as 77 caption tokens.
    if k.shape[1] % 2:
        lengths = jnp.full((k.shape[0],), k.shape[1], jnp.int32)
        k, v = _pad_length(k, 2), _pad_length(v, 2)
    out = jax.nn.dot_product_attention(
        _pad_length(q, 2), k, v, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return out[:, :t]


def _splash(q, k, v, *, interpret: bool = False):
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
        q=jnp.zeros(q.shape[1], jnp.int32),
        kv=jnp.asarray(np.arange(k.shape[1]) >= l, jnp.int32),
    )
    mask = MultiHeadMask([FullMask((q.shape[1], k.shape[1]))] * q.shape[2])
    kernel = make_splash_mha_single_device(mask, interpret=interpret)
    heads_first = (rearrange(x, "n s h c -> n h s c") for x in (q, k, v))
    out = jax.vmap(kernel, in_axes=(0, 0, 0, None))(*heads_first, segments)
    return rearrange(out, "n h t c -> n t h c")[:, :t]


def _looped(q, k, v):
    """As many heads at a time as have scores that stay in a CPU's cache, and again backwards."""
    n = q.shape[0]
    q = rearrange(q * q.shape[-1] ** -0.5, "n t h c -> (n h) t c")
    k, v = (rearrange(x, "n l h c -> (n h) l c") for x in (k, v))
    return rearrange(_by_heads(q, k, v), "(n h) t c -> n t h c", n=n)


def _looped_over_heads(function, *arrays):
    """function of the heads' arrays (heads, ., c), for LOOPED_SCORES scores at a time."""
    heads, t, l = *arrays[0].shape[:2], arrays[1].shape[1]  # noqa: E741
    most = max(1, LOOPED_SCORES // (t * l))
    size = next(size for size in range(min(heads, most), 0, -1) if heads % size == 0)
    if size == heads:
        return function(*arrays)
    parts = tuple(x.reshape(heads // size, size, *x.shape[1:]) for x in arrays)
    out = jax.lax.map(lambda part: function(*part), parts)
    return jax.tree.map(lambda x: x.reshape(heads, *x.shape[2:]), out)


def _products(x, y, axis_x: int, axis_y: int):
    """Of each head, summed over one axis of each, in float32."""
    dims = (((axis_x,), (axis_y,)), ((0,), (0,)))
    return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)


def _exponentials(q, k):
    """Of the scores, and their sums: the softmax is their quotient."""
    scores = _products(q, k, 2, 2)
    p = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    return p, p.sum(axis=-1, keepdims=True)


@jax.custom_vjp
def _by_heads(q: Float[Array, "m t c"], k: Float[Array, "m l c"], v: Float[Array, "m l c"]):
    """Attention of m heads, q scaled; the backward pass computes the scores anew."""

    def some(q, k, v):
        p, total = _exponentials(q, k)
        return (_products(p.astype(v.dtype), v, 2, 1) / total).astype(v.dtype)

    return _looped_over_heads(some, q, k, v)


def _by_heads_forward(q, k, v):
    out = _by_heads(q, k, v)
    return out, (q, k, v, out)


def _by_heads_backward(residuals, g):
    def some(q, k, v, out, g):
        p, total = _exponentials(q, k)
        p = p / total  # (m, t, l)
        dv = _products(p.astype(v.dtype), g, 1, 1)
        mean = (g.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
        ds = (p * (_products(g, v, 2, 2) - mean)).astype(q.dtype)
        (ds,) = held(ds)
        dq, dk = _products(ds, k, 2, 1), _products(ds, q, 1, 1)
        return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)

    return _looped_over_heads(some, *residuals, g)


_by_heads.defvjp(_by_heads_forward, _by_heads_backward)


def attend(
    q: Float[Array, "n t h c"],
    k: Float[Array, "n l h c"],
    v: Float[Array, "n l h c"],
    implementation: str,
) -> Float[Array, "n t h c"]:
    """Softmax attention, scale 1/sqrt(c), softmax in float32, no mask.

    Args:
      implementation: "xla" runs anywhere; "looped" too, and is made for CPUs: it keeps no scores
        for the backward pass; "cudnn" is the fused kernel of NVIDIA GPUs (16-bit types only);
        "splash" the Pallas kernel of TPUs.
    """
    if implementation == "xla":
        # JAX's own code mixes bfloat16 with float32, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            return jax.nn.dot_product_attention(q, k, v, implementation="xla")
    return {"looped": _looped, "cudnn": _cudnn, "splash": _splash}[implementation](q, k, v)


class _Attention(nn.Module):
    """What both attentions share: sizes, kinds and the q/k norm over all heads together."""

    hidden: int
    head_dim: int
    use_bias: bool
    eps: float
    implementation: str
    init_std: float
    out_init: Initializer = xavier
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def linear(self, features: int, init: Initializer) -> nn.Dense:
        return Linear(
            features,
            use_bias=self.use_bias,
            kernel_init=init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )

    def heads(self, x: Float[Array, "n s f"]) -> Float[Array, "n s h c"]:
        return rearrange(x, "n s (h c) -> n s h c", c=self.head_dim)

    def normed_heads(self, x: Float[Array, "n s f"]) -> Float[Array, "n s h c"]:
        """Non-affine layer norm over the full hidden width, then the split into heads."""
        return self.heads(normalise(x, self.eps).astype(self.dtype))


class SelfAttention(_Attention):
    """Attention among all tokens of a sequence; q, k, v from one projection, in that order."""

    dim: int = 0

    def setup(self):
        self.qkv = self.linear(3 * self.hidden, small_normal(self.init_std))
        self.proj = self.linear(self.dim, self.out_init)

    def __call__(self, x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        q, k, v = self.normed_heads(q), self.normed_heads(k), self.heads(v)
        out = attend(q, k, v, self.implementation)
        return self.proj(rearrange(out, "n t h c -> n t (h c)"))


class CrossAttention(_Attention):
    """Image tokens attend to caption tokens, whose keys and values can be computed ahead."""

    def setup(self):
        self.q_linear = self.linear(self.hidden, small_normal(self.init_std))
        self.kv_linear = self.linear(2 * self.hidden, small_normal(self.init_std))
        self.proj = self.linear(self.hidden, self.out_init)

    def keys_values(self, y: Float[Array, "n l d"]) -> KeysValues:
        """The caption's normed keys and its values, each (n, l, h, c)."""
        k, v = jnp.split(self.kv_linear(y), 2, axis=-1)
        return self.normed_heads(k), self.heads(v)

    def __call__(self, x: Float[Array, "n t d"], keys_values: KeysValues) -> Float[Array, "n t d"]:
        q = self.normed_heads(self.q_linear(x))
        out = attend(q, *keys_values, self.implementation)
        return self.proj(rearrange(out, "n t h c -> n t (h c)"))
