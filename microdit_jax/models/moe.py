"""Expert-choice mixture of experts (Zhou et al. 2022): experts pick tokens within each image."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from microdit_jax.errors import UserError
from microdit_jax.models.layers import Initializer, Precision, gelu_erf, linear, small_normal
from microdit_jax.models.matmuls import batched_matmul

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


def dispatch_gather(
    x: Float[Array, "n t d"],
    weight: Float[Array, "n e k"],
    index: Int[Array, "n e k"],
    w1: Float[Array, "e_here d f"],
    w2: Float[Array, "e_here f d"],
) -> Float[Array, "n t d"]:
    """Gathers the chosen tokens and scatter-adds the experts' outputs to their tokens."""
    n, t, d = x.shape
    e, k = index.shape[1:]
    flat = index.reshape(n, e * k)  # slots of all experts in a row
    tokens = jnp.take_along_axis(x, flat[:, :, None], axis=1)  # (n, e k, d)
    tokens = tokens.reshape(n, e, k, d).transpose(1, 0, 2, 3)  # (e, n, k, d)
    out = sharded_experts(tokens, w1, w2).transpose(1, 0, 2, 3)  # (n, e, k, d)
    out = (out * weight[..., None].astype(x.dtype)).reshape(n, e * k, d)  # (n, e k, d)
    return jax.vmap(lambda i, o: jnp.zeros((t, d), x.dtype).at[i].add(o))(flat, out)


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
        gate = linear(
            e,
            self.precision.in_float32(),  # rounded logits tie, and ties route tokens at random
            use_bias=False,
            kernel_init=small_normal(self.init_std),
            name="gate",
        )
        weight, index = choose_tokens(gate(x), slots_of(self.capacity, t, e))  # each (n, e, k)
        self.sow("intermediates", "routing", index)
        dispatch = DISPATCHES[self.dispatch]
        return dispatch(x.astype(dtype), weight, index, w1.astype(dtype), w2.astype(dtype))
