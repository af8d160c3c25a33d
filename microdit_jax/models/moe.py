"""Expert-choice mixture of experts (Zhou et al. 2022): experts pick tokens within each image."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from microdit_jax.errors import UserError
from microdit_jax.models.activations import gelu_erf
from microdit_jax.models.derivatives import as_kept, with_backward
from microdit_jax.models.layers import Initializer, Precision, small_normal
from microdit_jax.models.matmuls import batched_matmul, fusion_barrier, named

EXPERT_AXIS = "expert"  # the mesh axis over which experts are split (sharding.py)


def expert_devices() -> int:
    """Number of devices that share the experts: the mesh axis `expert` inside `shard_map`, else 1.

    Outside `shard_map` the code below names no device, and the partitioner may split it at will.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[EXPERT_AXIS] if EXPERT_AXIS in mesh.manual_axes else 1


def slots_of(capacity: float, t: int, e: int) -> int:
    """Number k = int(capacity * t / e) of an image's t tokens that each expert takes."""
    return int(capacity * t / e)


def check_slots(capacity: float, t: int, e: int) -> None:
    """Raises UserError if no expert would take a token, so that the layer would change nothing."""
    if not slots_of(capacity, t, e):
        raise UserError(
            f"expected experts that take a token or more, found {e} for {t} tokens at "
            f"expert_capacity {capacity:g}; give fewer num_experts, more expert_capacity or a "
            "smaller mask_ratio"
        )


def choose_tokens(
    logits: Float[Array, "n t e"], slots: int
) -> tuple[Float[Array, "n e k"], Int[Array, "n e k"]]:
    """Chooses each expert's k best tokens of each image, by the softmax over experts in float32.

    Several experts may take a token, or none.

    Returns:
      The chosen tokens' probabilities (n, e, k) float32 and indices (n, e, k) int32.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)  # (n, t, e)
    weight, index = jax.lax.top_k(probabilities.swapaxes(1, 2), slots)
    return weight, index


def experts(
    x: Float[Array, "e n k d"], w1: Float[Array, "e d f"], w2: Float[Array, "e f d"]
) -> Float[Array, "e n k d"]:
    """GELU_erf(x w1[e]) w2[e]: the exact erf GELU, the only one in the network."""
    e, n, k, d = x.shape
    hidden = gelu_erf(batched_matmul(x.reshape(e, n * k, d), w1))  # (e, n * k, f)
    return batched_matmul(hidden, w2).reshape(e, n, k, d)


def sharded_experts(
    x: Float[Array, "e n k d"], w1: Float[Array, "e_here d f"], w2: Float[Array, "e_here f d"]
) -> Float[Array, "e n k d"]:
    """`experts` split over devices: two all-to-alls carry tokens there and back.

    Before the first all-to-all a device has the tokens of its n images for all e experts; after
    it, those of all images of its expert group for its own e / devices experts.
    """
    if expert_devices() == 1:
        return experts(x, w1, w2)
    # (e, n, k, d) -> (e_here, n * devices, k, d)
    x = jax.lax.all_to_all(x, EXPERT_AXIS, split_axis=0, concat_axis=1, tiled=True)
    out = experts(x, w1, w2)
    return jax.lax.all_to_all(out, EXPERT_AXIS, split_axis=1, concat_axis=0, tiled=True)


# ------------------------------------------------------------------ tokens to experts and back
# The two ways are each other's transposes, so each is the other's backward pass. A token finds its
# slots by their inverse index: in 16 bits no row is scattered, in no order but the experts', and
# nothing is summed in memory.
def token_slots(index: Int[Array, "n e k"], t: int) -> Int[Array, "n e t"]:
    """Each token's slot at each expert, or -1 where that expert does not take it."""
    slots = jnp.broadcast_to(jnp.arange(index.shape[2], dtype=jnp.int32), index.shape)
    place = jax.vmap(jax.vmap(lambda i, slot: jnp.full(t, -1, jnp.int32).at[i].set(slot)))
    return place(index, slots)


def _rows_of(x: Array, index: Array) -> Array:
    """Returns row `index` (n, m) of each image's x (n, s, d), as (n, m, d)."""
    return jnp.take_along_axis(x, index[:, :, None], axis=1, mode="promise_in_bounds")


def _to_experts(x: Array, index: Array) -> Array:
    n, e, k = index.shape
    rows = _rows_of(x, index.reshape(n, e * k)).reshape(n, e, k, x.shape[2])
    return rows.transpose(1, 0, 2, 3)  # (n, e, k, d) -> (e, n, k, d)


def _scattered(out: Array, weight: Array | None, index: Array, t: int) -> Array:
    """Computes `_to_tokens` by a scatter, which rounds each product before it is added."""
    n, e, k = index.shape
    rows = out.transpose(1, 0, 2, 3)  # (e, n, k, d) -> (n, e, k, d)
    rows = rows if weight is None else rows * weight[..., None]
    flat, rows = index.reshape(n, e * k), rows.reshape(n, e * k, out.shape[3])
    add = jax.vmap(lambda i, one: jnp.zeros((t, one.shape[1]), one.dtype).at[i].add(one))
    return add(flat, rows)  # (n, t, d)


def _to_tokens(out: Array, weight: Array | None, index: Array, t: int) -> Array:
    if out.dtype == jnp.float32:  # whose samples stay what they were to the bit
        return _scattered(out, weight, index, t)
    total = jnp.zeros((out.shape[1], t, out.shape[3]), jnp.float32)
    for expert, slot in enumerate(token_slots(index, t).swapaxes(0, 1)):  # (n, t)
        taken, at = slot >= 0, jnp.maximum(slot, 0)
        rows = _rows_of(out[expert], at).astype(jnp.float32)  # (n, t, d)
        if weight is not None:
            rows = rows * jnp.take_along_axis(weight[:, expert], at, axis=1)[:, :, None]
        total = total + jnp.where(taken[:, :, None], rows, 0)
    return as_kept(total.astype(out.dtype))[0]  # (n, t, d); else XLA would keep it in float32


def _to_experts_backward(t: int, index: Array, g: Array) -> tuple[Array, None]:
    return _to_tokens(g, None, index, t), None


@with_backward(
    lambda x, index, t: (_to_experts(x, index), index), _to_experts_backward, static=(2,)
)
def to_experts(
    x: Float[Array, "n t d"], index: Int[Array, "n e k"], t: int
) -> Float[Array, "e n k d"]:
    """Gathers each expert's tokens."""
    return _to_experts(x, index)


def _to_tokens_backward(
    t: int, residuals: tuple[Array, Array, Array], g: Array
) -> tuple[Array, Array, None]:
    out, weight, index = residuals
    rows = _to_experts(g, index).astype(jnp.float32)  # (e, n, k, d)
    dout = rows * weight.swapaxes(0, 1)[..., None]
    dweight = (rows * out.astype(jnp.float32)).sum(axis=-1).swapaxes(0, 1)  # (n, e, k)
    return dout.astype(out.dtype), dweight, None


@with_backward(
    lambda out, weight, index, t: (_to_tokens(out, weight, index, t), (out, weight, index)),
    _to_tokens_backward,
    static=(3,),
)
def to_tokens(
    out: Float[Array, "e n k d"],
    weight: Float32[Array, "n e k"],
    index: Int[Array, "n e k"],
    t: int,
) -> Float[Array, "n t d"]:
    """Sums the experts' weighted outputs of each token, in float32; zero where none took it."""
    return _to_tokens(out, weight, index, t)


def dispatch_gather(
    x: Float[Array, "n t d"],
    weight: Float[Array, "n e k"],
    index: Int[Array, "n e k"],
    w1: Float[Array, "e_here d f"],
    w2: Float[Array, "e_here f d"],
) -> Float[Array, "n t d"]:
    """Gathers the chosen tokens, and the experts' outputs for each token."""
    t = x.shape[1]
    return to_tokens(sharded_experts(to_experts(x, index, t), w1, w2), weight, index, t)


def dispatch_onehot(
    x: Float[Array, "n t d"],
    weight: Float[Array, "n e k"],
    index: Int[Array, "n e k"],
    w1: Float[Array, "e_here d f"],
    w2: Float[Array, "e_here f d"],
) -> Float[Array, "n t d"]:
    """Equals `dispatch_gather`, by one-hot matmuls as in the reference: more FLOPs, no gathers."""
    chosen = jax.nn.one_hot(index, x.shape[1], dtype=x.dtype)  # (n, e, k, t)
    tokens = jnp.einsum("nekt,ntd->enkd", chosen, x)  # (e, n, k, d)
    out = sharded_experts(tokens, w1, w2)  # (e, n, k, d)
    return jnp.einsum("nekt,enkd->ntd", chosen * weight[..., None].astype(x.dtype), out)


DISPATCHES = {"gather": dispatch_gather, "onehot": dispatch_onehot}


# ------------------------------------------------------------------ the layer
def _in_parts(x: Array, w: Array) -> Array:
    """Returns w in float32, or, for a 16-bit x, its rounded values and what they lack: (d, 2 e)."""
    if x.dtype == jnp.float32:
        return w
    form = jnp.finfo(x.dtype)
    rounded = jax.lax.reduce_precision(w, form.nexp, form.nmant)
    return jnp.concatenate([rounded, w - rounded], axis=1).astype(x.dtype)


def _logits_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    parts = jax.lax.dot_general(
        x, _in_parts(x, w), (((2,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )  # (n, t, e) or (n, t, 2 e)
    # Kept, they choose the same tokens in a backward pass that chooses again.
    return named(parts.reshape(*x.shape[:2], -1, w.shape[1]).sum(axis=2)), (x, w)


def _logits_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = residuals
    x, g = fusion_barrier(x, g.astype(x.dtype))
    dx = jax.lax.dot_general(g, w.astype(x.dtype), (((2,), (1,)), ((), ())))  # (n, t, d)
    dw = jax.lax.dot_general(
        x, g, (((0, 1), (0, 1)), ((), ())), preferred_element_type=jnp.float32
    )  # (d, e)
    return dx, dw


@with_backward(_logits_forward, _logits_backward)
def gate_logits(x: Float[Array, "n t d"], w: Float32[Array, "d e"]) -> Float32[Array, "n t e"]:
    """Returns x w in float32, where x may be of 16 bits: w is not rounded, nor is the result."""
    return _logits_forward(x, w)[0]


class Gate(nn.Module):
    """Linear map of tokens to logits of experts; rounded logits tie, and ties choose at random."""

    num_experts: int
    kernel_init: Initializer
    param_dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "n t d"]) -> Float32[Array, "n t e"]:
        shape = x.shape[-1], self.num_experts
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        return gate_logits(x, kernel.astype(jnp.float32))


class ExpertChoiceFeedForward(nn.Module):
    """e experts, each taking k of each image's tokens; no auxiliary loss.

    Attributes:
      capacity: experts that take a token, on average.
      hidden: width f of an expert.
      dispatch: a name of DISPATCHES.
    """

    num_experts: int
    capacity: float
    hidden: int
    init_std: float
    out_init: Initializer
    dispatch: str
    precision: Precision

    @nn.compact
    def __call__(self, x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
        t, d = x.shape[1:]
        e, f = self.num_experts, self.hidden
        dtype, param_dtype = self.precision.dtype, self.precision.param_dtype
        e_here = e // expert_devices()
        w1 = self.param("w1", small_normal(self.init_std), (e_here, d, f), param_dtype)
        w2 = self.param("w2", self.out_init, (e_here, f, d), param_dtype)
        gate = Gate(e, small_normal(self.init_std), param_dtype, name="gate")
        weight, index = choose_tokens(gate(x), slots_of(self.capacity, t, e))  # each (n, e, k)
        self.sow("intermediates", "routing", index)
        dispatch = DISPATCHES[self.dispatch]
        return dispatch(x.astype(dtype), weight, index, w1, w2)
