"""Expert-choice mixture of experts (Zhou et al. 2022): experts pick tokens within each image."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from microdit_jax.errors import UserError
from microdit_jax.models import products
from microdit_jax.models.layers import Dtype, Initializer, Linear, gelu_erf, small_normal

DISPATCHES = ("gather", "onehot")
EXPERT_AXIS = "expert"  # the mesh axis over which experts are split (sharding.py)


def expert_devices() -> int:
    """How many devices share the experts: the size of the mesh axis `expert` in `shard_map`, or 1.

    Outside `shard_map` the code below names no device and the partitioner may place it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[EXPERT_AXIS] if EXPERT_AXIS in mesh.manual_axes else 1


def slots_of(capacity: float, t: int, e: int) -> int:
    """Tokens k = int(capacity * t / e) that each expert takes of an image's t; rounded down."""
    return int(capacity * t / e)


def check_slots(capacity: float, t: int, e: int) -> None:
    """Raises UserError where no expert takes a token, and all would stay as they are."""
    if not slots_of(capacity, t, e):
        raise UserError(
            f"expected experts that take a token or more, found {e} for {t} tokens at "
            f"expert_capacity {capacity:g}; give fewer num_experts, more expert_capacity or a "
            "smaller mask_ratio"
        )


def choose_tokens(
    logits: Float[Array, "n t e"], slots: int
) -> tuple[Float[Array, "n e k"], Int[Array, "n e k"]]:
    """Each expert's k best tokens of each image, by the softmax over experts in float32.

    A token may be taken by several experts, or by none.

    Returns:
      The chosen tokens' probabilities (n, e, k) float32 and indices (n, e, k) int32.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weight, index = jax.lax.top_k(probabilities.swapaxes(1, 2), slots)
    return weight, index


def experts(
    x: Float[Array, "e n k d"], w1: Float[Array, "e d f"], w2: Float[Array, "e f d"]
) -> Float[Array, "e n k d"]:
    """GELU_erf(x w1[e]) w2[e]: the exact erf GELU, the only one in the network."""
    e, n, k, d = x.shape
    hidden = gelu_erf(products.products(x.reshape(e, n * k, d), w1))  # (e, n k, f)
    return products.products(hidden, w2).reshape(e, n, k, d)


def exchanged_experts(
    x: Float[Array, "e n k d"], w1: Float[Array, "e_here d f"], w2: Float[Array, "e_here f d"]
) -> Float[Array, "e n k d"]:
    """`experts`, some of which live on other devices: tokens travel there and back.

    Before the first all-to-all a device has the tokens of its n images for all e experts; after
    it, those of all images of its expert group for its own e / devices experts.
    """
    if expert_devices() == 1:
        return experts(x, w1, w2)
    x = jax.lax.all_to_all(x, EXPERT_AXIS, split_axis=0, concat_axis=1, tiled=True)
    return jax.lax.all_to_all(
        experts(x, w1, w2), EXPERT_AXIS, split_axis=1, concat_axis=0, tiled=True
    )


def dispatch_gather(
    x: Float[Array, "n t d"],
    weight: Float[Array, "n e k"],
    index: Int[Array, "n e k"],
    w1: Float[Array, "e_here d f"],
    w2: Float[Array, "e_here f d"],
) -> Float[Array, "n t d"]:
    """Gathers the chosen tokens and scatter-adds the experts' outputs back into place."""
    n, t, d = x.shape
    e, k = index.shape[1:]
    flat = index.reshape(n, e * k)
    tokens = jnp.take_along_axis(x, flat[:, :, None], axis=1)  # (n, e k, d)
    tokens = tokens.reshape(n, e, k, d).transpose(1, 0, 2, 3)  # (e, n, k, d)
    out = exchanged_experts(tokens, w1, w2).transpose(1, 0, 2, 3)  # (n, e, k, d)
    out = (out * weight[..., None].astype(x.dtype)).reshape(n, e * k, d)
    return jax.vmap(lambda i, o: jnp.zeros((t, d), x.dtype).at[i].add(o))(flat, out)


def dispatch_onehot(
    x: Float[Array, "n t d"],
    weight: Float[Array, "n e k"],
    index: Int[Array, "n e k"],
    w1: Float[Array, "e_here d f"],
    w2: Float[Array, "e_here f d"],
) -> Float[Array, "n t d"]:
    """The same by one-hot matrix products, as the reference does it: more FLOPs, no gathers."""
    chosen = jax.nn.one_hot(index, x.shape[1], dtype=x.dtype)  # (n, e, k, t)
    tokens = jnp.einsum("nekt,ntd->enkd", chosen, x)
    out = exchanged_experts(tokens, w1, w2)
    return jnp.einsum("nekt,enkd->ntd", chosen * weight[..., None].astype(x.dtype), out)


class ExpertChoiceFeedForward(nn.Module):
    """e experts, each taking k of each image's tokens; no auxiliary loss."""

    num_experts: int
    capacity: float
    hidden: int
    init_std: float
    out_init: Initializer
    dispatch: str
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
        t, d = x.shape[1:]
        e, f = self.num_experts, self.hidden
        e_here = e // expert_devices()
        w1 = self.param("w1", small_normal(self.init_std), (e_here, d, f), self.param_dtype)
        w2 = self.param("w2", self.out_init, (e_here, f, d), self.param_dtype)
        gate = Linear(
            e,
            use_bias=False,
            kernel_init=small_normal(self.init_std),
            dtype=jnp.float32,  # rounded logits tie, and ties route tokens at random
            param_dtype=self.param_dtype,
            name="gate",
        )
        weight, index = choose_tokens(gate(x), slots_of(self.capacity, t, e))
        self.sow("intermediates", "routing", index)
        x = x.astype(self.dtype)
        dispatch = {"gather": dispatch_gather, "onehot": dispatch_onehot}[self.dispatch]
        return dispatch(x, weight, index, w1.astype(self.dtype), w2.astype(self.dtype))
