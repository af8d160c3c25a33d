"""Parts that ask whether a GPU computes the right thing."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from convert import parity
from microdit_jax.convert.dit import from_torch
from microdit_jax.files import parse_json, read_npz
from microdit_jax.models import attention
from microdit_jax.models.dit import DiTConfig
from microdit_jax.noise import torch_cuda_randn
from microdit_jax.xla.bench import timing
from tools.device_check.parts import GOLDEN_FILES
from tools.device_check.work import Setup

SEED = 2024


# ------------------------------------------------------------------------------ golden files
def golden(setup: Setup) -> None:
    """Compares both compute types with the reference's recorded output and activations."""
    for name in GOLDEN_FILES[:1] if setup.small else GOLDEN_FILES:
        path = setup.golden / f"{name}.npz"
        arrays = read_npz(path)
        config = DiTConfig(**parse_json(str(arrays["config"])))
        tensors = {
            key.removeprefix("state_dict/"): value
            for key, value in arrays.items()
            if key.startswith("state_dict/")
        }
        params = jax.tree.map(jnp.asarray, from_torch(tensors, config))
        recorded = parity.read_recording(path, config)
        for dtype in parity.DTYPES:
            ours = parity.run_ours(config, params, recorded.inputs, 0.0, dtype)
            *modules, sample = parity.rows({dtype: ours}, recorded.outputs)
            found = {key: sample[dtype][key] for key in ("relative_l2", "median")}
            found["worst_module"] = max((row[dtype]["relative_l2"] for row in modules), default=0.0)
            setup.tell(**{f"{name}/{dtype}/{key}": value for key, value in found.items()})


# ------------------------------------------------------------------------------ noise
def noise(setup: Setup) -> None:
    """Compares our noise of the kind torch_cuda with this GPU's own, also beyond one launch."""
    import torch  # pyright: ignore[reportMissingImports]  # the part is skipped without it

    gpu = torch.cuda.get_device_properties(0)
    sizes = {
        "multiprocessors": gpu.multi_processor_count,
        "threads_per_multiprocessor": gpu.max_threads_per_multi_processor,
    }
    threads = sizes["multiprocessors"] * (sizes["threads_per_multiprocessor"] // 256) * 256
    setup.tell(values_in_one_launch=4 * threads)
    for key, count in (("below", threads // 2 + 3), ("beyond", 10 * threads + 3)):
        generator = torch.Generator("cuda").manual_seed(SEED)
        theirs = torch.randn(count, generator=generator, device="cuda").cpu().numpy()
        ours = torch_cuda_randn(SEED, (count,), **sizes)
        setup.tell(**{key: float(np.abs(theirs - ours).max())})


# ------------------------------------------------------------------------------ attention
def fused_attention(setup: Setup) -> None:
    """Compares the platform's fused attention with XLA's: values, gradients and time."""
    config, variant = setup.config(32), setup.variant()
    fused = attention.IMPLEMENTATIONS["cudnn" if variant.attention == "cudnn" else "looped"]
    n = 2 if setup.small else 32
    heads = config.patch_mixer_dim // config.head_dim
    for shape, length in (("self", config.num_tokens), ("cross", parity.CAPTION_TOKENS)):
        keys = jax.random.split(jax.random.key(SEED), 4)
        sizes = (config.num_tokens, length, length, config.num_tokens)
        q, k, v, g = (
            jax.random.normal(key, (n, size, heads, config.head_dim), variant.dtype)
            for key, size in zip(keys, sizes, strict=True)
        )
        exact = _gradients(attention.plain)
        with jax.default_matmul_precision("highest"):
            expected = exact(*(a.astype(jnp.float32) for a in (q, k, v, g)))
        works = []
        for kind, function in (("fused", fused), ("xla", attention.plain)):
            compute = _gradients(function)
            out, *gradients = compute(q, k, v, g)
            error = max(map(relative_l2, gradients, expected[1:]))
            setup.tell(
                **{
                    f"{shape}/{kind}_error": relative_l2(out, expected[0]),
                    f"{shape}/{kind}_gradient_error": error,
                }
            )
            works.append(lambda f=compute, a=(q, k, v, g): jax.block_until_ready(f(*a)))
        times = timing.take_turns(works, repeats=3 if setup.small else 20)
        for kind, timed in zip(("fused", "xla"), times, strict=True):
            setup.tell(**{f"{shape}/{kind}_ms": 1e3 * timed.summary()["median"]})


def _gradients(function: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """Returns a program for a function's value and its cotangents."""

    @jax.jit
    def compute(q, k, v, g):
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(g.astype(out.dtype))

    return compute


def relative_l2(found: Float[Array, "..."], expected: Float[Array, "..."]) -> float:
    """Returns |found - expected| / |expected|, in float64."""
    one, other = (np.asarray(a, np.float64) for a in (found, expected))
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))
