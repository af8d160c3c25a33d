"""Initial noise of the sampler: JAX's own, and that of `torch.randn` on a CPU or a CUDA device.

The torch kinds let a seed published with an image made by torch start the same trajectory here.
Both are NumPy code: the noise of a batch is made once, on the host.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt32

from microdit_jax.errors import UserError
from microdit_jax.machine import memory

KINDS = ("jax", "torch_cpu", "torch_cuda")
ADDED_STREAM = np.uint32(0xADD3D)  # keeps the key of `added_noise` apart from the initial noise's


def initial_noise(
    kind: str,
    seed: Any,
    num_images: int,
    height: int,
    width: int,
    channels: int,
    *,
    first: int = 0,
) -> Float32[np.ndarray, "{num_images} {height} {width} {channels}"]:
    """Samples standard normal noise for `num_images` latents, channels-last.

    Args:
      kind: "jax": image i is `jax.random.normal(fold_in(key, i))`, a function of (seed, i) that
        does not depend on the batch; the key is threefry's, of all 64 bits of the seed. "torch_cpu"
        and "torch_cuda": `torch.randn(num_images, channels, height, width)` from a generator with
        this seed, transposed. Then image i depends on the batch, and for "torch_cuda" on the GPU,
        which is the default one of `torch_cuda_randn`.
      seed: an int in [0, 2**64).
      first: index of the first image, for a part of a larger set; "jax" only.
    Returns:
      (num_images, height, width, channels) float32.
    Raises:
      UserError: unknown kind, a seed that is no int or out of range, a size below 1.
    """
    seed = _checked_seed(seed)
    if kind not in KINDS:
        raise UserError(f"noise: expected one of {', '.join(KINDS)}; found {kind!r}; name one")
    if min(num_images, height, width, channels) < 1:
        sizes = (num_images, height, width, channels)
        raise UserError(f"noise: expected images, height, width, channels >= 1; found {sizes}")
    if first and kind != "jax":
        raise UserError(f"noise {kind} depends on the whole batch, found images from {first} on")
    if first < 0 or first + num_images > 2**32:
        raise UserError(f"noise: expected at most 2**32 images in a set; found {first} and more")
    if kind == "jax":
        # The program is compiled for one image, so that no batch size changes its rounding. The key
        # is made from its two words: `jax.random.key` drops the upper 32 bits of a Python int.
        words = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
        shape = (height, width, channels)
        images = [
            _normal_image(words, np.uint32(i), shape=shape)
            for i in range(first, first + num_images)
        ]
        return np.stack([np.asarray(image) for image in images])
    memory.check_host(
        8 * num_images * channels * height * width,  # and the same once more with channels last
        what=f"{kind} noise of {num_images} images",
        fix="sample fewer, or take noise=jax, which needs only the noise of the images asked for",
    )
    randn = torch_cpu_randn if kind == "torch_cpu" else torch_cuda_randn
    channels_first = randn(seed, (num_images, channels, height, width))
    return np.ascontiguousarray(channels_first.transpose(0, 2, 3, 1))


def added_noise(
    seed: int, index: int, number: int, shape: tuple[int, ...]
) -> Float32[np.ndarray, "..."]:
    """Standard normal noise that a sampler adds on its way, a function of its arguments alone.

    Args:
      seed: of the initial noise, from which this is independent, whatever its kind.
      index: of the image in its set.
      number: of the evaluation before which it is added, from 0.
    """
    seed = _checked_seed(seed)
    words = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32) ^ ADDED_STREAM
    return np.asarray(_added_image(words, np.uint32(index), np.uint32(number), shape=shape))


def _checked_seed(seed: Any) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
        raise UserError(f"seed: expected an int in [0, 2**64); found {seed!r}; give such a number")
    return int(seed)


@functools.partial(jax.jit, static_argnames="shape")
def _normal_image(
    words: UInt32[Array, "2"], index: UInt32[Array, ""], *, shape: tuple[int, ...]
) -> Float32[Array, "..."]:
    key = jax.random.wrap_key_data(words, impl="threefry2x32")
    return jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32)


@functools.partial(jax.jit, static_argnames="shape")
def _added_image(
    words: UInt32[Array, "2"],
    index: UInt32[Array, ""],
    number: UInt32[Array, ""],
    *,
    shape: tuple[int, ...],
) -> Float32[Array, "..."]:
    key = jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), index)
    return jax.random.normal(jax.random.fold_in(key, number), shape, jnp.float32)


# ------------------------------------------------------------------------------------ torch, CPU


def torch_cpu_randn(seed: Any, shape: tuple[int, ...]) -> Float32[np.ndarray, "..."]:
    """Equals `torch.randn(shape)` on an x86 CPU, from a fresh generator with this seed, to the bit.

    MT19937, seeded with the low 32 bits of `seed`. From 16 values on, a block of 16 uniforms u of
    24 bits gives 8 pairs (Box-Muller):
      z[j], z[j+8] = sqrt(-2 ln(1 - u[j])) * (cos, sin)(2 pi u[j+8]),  j < 8,
    and if the size is no multiple of 16, the last 16 values are made from 16 further uniforms.
    Below 16 values, pairs are computed in double precision from uniforms of 53 bits.

    Bit for bit equal to torch 2.13 with AVX2 (which AVX-512 machines use here too): 0 of 19 million
    values differ, sizes 1 to 1,000,003, seeds over all of [0, 2**64). That takes torch's own
    float32 ln, sin and cos (Cephes polynomials, fused multiply-adds); correctly rounded functions
    would differ in 17 % of the values, by up to 3 ulp. torch's own results vary between processors:
    without AVX2 it rounds 38 % of the values differently, by up to 2.4e-6.

    Args:
      seed: an int in [0, 2**64).
      shape: any, of at least one value.
    Raises:
      UserError: the seed is no int or out of range.
    """
    seed, size = _checked_seed(seed), math.prod(shape)
    # RandomState: numpy froze its seeding and its stream (NEP 19), and both are torch's.
    mt19937 = np.random.RandomState(seed & 0xFFFFFFFF)
    if size < 16:
        words = mt19937.randint(0, 2**32, 4 * -(-size // 2), np.uint32).astype(np.uint64)
        u = (words[0::2] << np.uint64(32) | words[1::2]) & np.uint64(2**53 - 1)
        u1, u2 = u.astype(np.float64).reshape(-1, 2).T * 2.0**-53
        radius, theta = np.sqrt(-2 * np.log1p(-u2)), 2 * np.pi * u1
        pairs = np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=-1)
        return pairs.reshape(-1)[:size].astype(np.float32).reshape(shape)
    extra = 16 if size % 16 else 0
    words = mt19937.randint(0, 2**32, size + extra, np.uint32)
    uniform = (words & np.uint32(2**24 - 1)).astype(np.float32) * np.float32(2**-24)
    out = np.empty(size, np.float32)
    whole = size - size % 16
    chunk = 2**16  # values whose intermediate arrays fit in the cache
    for start in range(0, whole, chunk):
        stop = min(start + chunk, whole)
        out[start:stop] = _box_muller_16(uniform[start:stop])
    if extra:
        out[-16:] = _box_muller_16(uniform[size:])
    return out.reshape(shape)


def _box_muller_16(uniform: Float32[np.ndarray, " s"]) -> Float32[np.ndarray, " s"]:
    u = uniform.reshape(-1, 2, 8)  # (blocks, radius or angle, j)
    radius = np.sqrt(np.float32(-2) * _cephes_log(np.float32(1) - u[:, 0]))
    sin, cos = _cephes_sin_cos(np.float32(2 * np.pi) * u[:, 1])
    # + 0 as in torch's "* std + mean": it turns -0 into 0.
    return np.stack([radius * cos, radius * sin], axis=1).reshape(-1) + np.float32(0)


def _fma(a: Any, b: Any, c: Any) -> Float32[np.ndarray, "..."]:
    """Returns a b + c of float32 values, rounded once: float64 holds a b exactly."""
    return (np.multiply(a, b, dtype=np.float64) + c).astype(np.float32)


def _horner(x: Float32[np.ndarray, "..."], *coefficients: float) -> Float32[np.ndarray, "..."]:
    y = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        y = _fma(y, x, np.float32(coefficient))
    return y


# Below, the order of rounding is that of torch's machine code: each fused multiply-add is an _fma.


def _cephes_log(x: Float32[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    """ln(x) for 0 < x <= 1: x = 2^e (1 + r), 1 + r in [sqrt(1/2), sqrt(2)) (Cephes logf)."""
    mantissa, exponent = np.frexp(x)
    low = mantissa < np.float32(0.5**0.5)
    e = (exponent - low).astype(np.float32)
    r = (mantissa - np.float32(1)) + np.where(low, mantissa, np.float32(0))
    z = r * r
    series = _horner(
        r,
        *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
        *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
    )
    y = _fma(series * r, z, e * np.float32(-2.12194440e-4))  # ln 2 = 0.693359375 - 2.12194440e-4
    y = _fma(z, np.float32(-0.5), y)
    return _fma(e, np.float32(0.693359375), r + y)


def _cephes_sin_cos(
    x: Float32[np.ndarray, "..."],
) -> tuple[Float32[np.ndarray, "..."], Float32[np.ndarray, "..."]]:
    """sin(x), cos(x) for 0 <= x < 2 pi: r = x - j pi/4 with j even, |r| <= pi/4 (Cephes sinf)."""
    j = (x * np.float32(4 / np.pi)).astype(np.int32) + 1 & ~1
    r = x
    for part in (-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8):  # -pi/4
        r = _fma(j.astype(np.float32), np.float32(part), r)
    z = r * r
    cos_series = _horner(z, 2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
    cos_r = _fma(cos_series * z, z, -(z * np.float32(0.5))) + np.float32(1)
    sin_series = _horner(z, -1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
    sin_r = _fma(sin_series * z, r, r)
    swap = j & 2 != 0
    sin, cos = np.where(swap, cos_r, sin_r), np.where(swap, sin_r, cos_r)
    return np.where(j & 4 != 0, -sin, sin), np.where(j + 2 & 4 != 0, -cos, cos)


# ----------------------------------------------------------------------------------- torch, CUDA


def torch_cuda_randn(
    seed: Any,
    shape: tuple[int, ...],
    *,
    multiprocessors: int = 132,
    threads_per_multiprocessor: int = 2048,
) -> Float32[np.ndarray, "..."]:
    """Equals `torch.randn(shape, device="cuda")` from a fresh generator with this seed, to 6e-7.

    Thread t of T, at its step s, turns the four words of philox(counter=(s, 0, t, 0), key=seed)
    into four normals, which go to the elements (4 s + k) T + t, k < 4. T is 256 times the number of
    blocks: enough to cover the size, but no more than the GPU runs at once,
    `multiprocessors * (threads_per_multiprocessor // 256)`. So the GPU matters only when there are
    more values than its threads: 270,336 on an H100 SXM (132 multiprocessors, the default), 221,184
    on an A100 (108); a 512-pixel latent of 4 channels has 16,384.

    ln, sin and cos are exact here; the GPU's fast sine and cosine err by 2^-21 of the radius or a
    little more. Values recorded on a GPU (seed 0 to 8 decimals, seed 42 to 4) agree to 6e-7; none
    of them lies beyond the thread count. Sources: ATen/native/cuda/DistributionTemplates.h;
    `curand_normal4` of cuRAND's device library.

    Args:
      seed: an int in [0, 2**64).
      shape: any, of at least one and less than 2**29 values (torch splits larger launches).
    Raises:
      UserError: the seed is no int or out of range; no value, or too many.
    """
    seed, size = _checked_seed(seed), math.prod(shape)
    if not 1 <= size < 2**29:
        raise UserError(f"torch_cuda noise: expected 1 to 2**29 - 1 values; found {size}")
    blocks = min(-(-size // 256), multiprocessors * (threads_per_multiprocessor // 256))
    threads = 256 * blocks
    steps = -(-size // (4 * threads))
    thread = np.arange(threads, dtype=np.uint32)
    zero = np.zeros_like(thread)
    key = (seed & 0xFFFFFFFF, seed >> 32)
    out = np.empty((steps, 4, threads), np.float32)
    for step in range(steps):
        words = philox4x32((zero + np.uint32(step), zero, thread, zero), key)
        out[step, 0], out[step, 1] = _curand_box_muller(words[0], words[1])
        out[step, 2], out[step, 3] = _curand_box_muller(words[2], words[3])
    return out.reshape(-1)[:size].reshape(shape)


def philox4x32(
    counter: tuple[UInt32[np.ndarray, "..."], ...], key: tuple[int, int], rounds: int = 10
) -> tuple[UInt32[np.ndarray, "..."], ...]:
    """Encrypts counters under one key by Philox4x32 (Salmon et al. 2011, section 3.3)."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(rounds):
        product0 = x0.astype(np.uint64) * np.uint64(0xD2511F53)
        product2 = x2.astype(np.uint64) * np.uint64(0xCD9E8D57)
        x0, x1, x2, x3 = (
            (product2 >> np.uint64(32)).astype(np.uint32) ^ x1 ^ np.uint32(k0),
            product2.astype(np.uint32),
            (product0 >> np.uint64(32)).astype(np.uint32) ^ x3 ^ np.uint32(k1),
            product0.astype(np.uint32),
        )
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return x0, x1, x2, x3


def _curand_box_muller(
    x: UInt32[np.ndarray, " t"], y: UInt32[np.ndarray, " t"]
) -> tuple[Float[np.ndarray, " t"], Float[np.ndarray, " t"]]:
    """sqrt(-2 ln u) (sin v, cos v) with float32 u = (x + 1/2) / 2^32, v = 2 pi (y + 1/2) / 2^32."""
    u = x.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)
    step = np.float32(2**-32 * 2 * np.pi)
    v = _fma(y.astype(np.float32), step, step / np.float32(2)).astype(np.float64)
    radius = np.sqrt(-2 * np.log(u.astype(np.float64)))
    return radius * np.sin(v), radius * np.cos(v)
