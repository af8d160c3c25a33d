"""Self- and cross-attention with layer-normed queries and keys, and the choice of kernel."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from microdit_jax.errors import UserError
from microdit_jax.models.layers import Dtype, Initializer, Linear, normalise, small_normal, xavier

IMPLEMENTATIONS = ("xla", "looped", "cudnn", "splash")
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
    """One head of one image after the other: scores stay in a CPU's cache."""
    n = q.shape[0]
    q = rearrange(q * q.shape[-1] ** -0.5, "n t h c -> (n h) t c")
    k, v = (rearrange(x, "n l h c -> (n h) l c") for x in (k, v))

    def one(qkv):
        q, k, v = qkv
        scores = jnp.einsum("tc,lc->tl", q, k, preferred_element_type=jnp.float32)
        return jax.nn.softmax(scores, axis=-1).astype(v.dtype) @ v

    out = jax.lax.map(one, (q, k, v))
    return rearrange(out, "(n h) t c -> n t h c", n=n)


def attend(
    q: Float[Array, "n t h c"],
    k: Float[Array, "n l h c"],
    v: Float[Array, "n l h c"],
    implementation: str,
) -> Float[Array, "n t h c"]:
    """Softmax attention, scale 1/sqrt(c), softmax in float32, no mask.

    Args:
      implementation: "xla" runs anywhere; "looped" too, and takes a third of the time on a CPU for
        1,024 tokens (2 images of 16 heads on 2 cores: 0.13 s, not 0.35 s), but loops over small
        products for few; "cudnn" is the fused kernel of NVIDIA GPUs (16-bit types only); "splash"
        the Pallas kernel of TPUs.
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
