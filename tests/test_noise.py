import pathlib

import jax
import numpy as np
import pytest

from microdit_jax import noise
from microdit_jax.errors import UserError

GOLDEN = pathlib.Path(__file__).parent / "golden" / "torch_cpu_randn.npz"
SIZES = {"num_images": 2, "height": 6, "width": 5, "channels": 4}


def assert_same_bits(found, expected):
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


# ------------------------------------------------------------------------------------ torch, CPU


def test_torch_cpu_equals_golden_to_the_bit():
    golden = np.load(GOLDEN)
    assert_same_bits(noise.torch_cpu_randn(2024, (2, 4, 32, 32)), golden["seed2024_2x4x32x32"])
    assert_same_bits(noise.torch_cpu_randn(7, (1, 3, 5)), golden["seed7_1x3x5"])
    large = noise.torch_cpu_randn(2024, (4, 4, 64, 64))
    assert_same_bits(large.reshape(-1)[:64], golden["seed2024_4x4x64x64_head"])
    assert_same_bits(large.reshape(-1)[-64:], golden["seed2024_4x4x64x64_tail"])
    mean_std = [large.mean(dtype=np.float64), large.std(dtype=np.float64, ddof=1)]
    np.testing.assert_allclose(mean_std, golden["seed2024_4x4x64x64_mean_std"], rtol=1e-5)


# Float32 words of torch 2.13 on an AVX2 machine: the last values of (seed, size).
TORCH_CPU = {
    (0, 1): [0x3FC53F5C],
    (0, 15): [0x3E3A67C6, 0xBF5B4F07, 0x3F8CE099, 0xBF891CAB],
    (7, 16): [0x3F3562D1, 0x3F81A1F8, 0x3E6BED28, 0x3F8B8A88],
    (2024, 17): [0x3F70675C, 0x3FB5169D, 0x3F2263D5, 0xBD9F0468],
    (2**31, 31): [0xBF3A81BA, 0x3F1D46D7, 0xBF9F71DD, 0x3F3203D0],
    (2**32 - 1, 1000): [0x3F9E7E87, 0x3D5D5054, 0x3DDF8AE9, 0x3F299C01],
    (2**32 + 5, 65536): [0x3EAD08AE, 0xBF3506A6, 0xBF84D8DB, 0xBD893B0F],
    (2**63, 65541): [0x3E9A997C, 0x3F158FF0, 0xBEEDDF9D, 0x3FE0548D],
    (2**64 - 1, 5): [0xBEC9349B, 0x3F82F420, 0xBEBF310E, 0xBD9AA517],
}


@pytest.mark.parametrize(("seed", "size"), TORCH_CPU)
def test_torch_cpu_equals_recorded_torch(seed, size):
    last = noise.torch_cpu_randn(seed, (size,))[-4:]
    assert_same_bits(last, np.array(TORCH_CPU[seed, size], np.uint32).view(np.float32))


def test_torch_cpu_redraws_the_last_16_values_of_a_ragged_size():
    ragged, whole = noise.torch_cpu_randn(3, (2**16 + 3,)), noise.torch_cpu_randn(3, (2**16,))
    assert_same_bits(ragged[: 2**16 - 13], whole[: 2**16 - 13])
    assert not np.any(ragged[2**16 - 13 : 2**16] == whole[2**16 - 13 :])


# ----------------------------------------------------------------------------------- torch, CUDA

# Random123, tests/kat_vectors: philox4x32, 10 rounds: counter, key, result.
PHILOX_KNOWN_ANSWERS = [
    "00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    "ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd",
    "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1",
]


@pytest.mark.parametrize("line", PHILOX_KNOWN_ANSWERS)
def test_philox_known_answers(line):
    words = [int(word, 16) for word in line.split()]
    counter = tuple(np.array([word], np.uint32) for word in words[:4])
    found = noise.philox4x32(counter, (words[4], words[5]))
    assert [int(word[0]) for word in found] == words[6:]


def test_torch_cuda_known_answers():
    seed_0 = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
        [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]
    np.testing.assert_allclose(noise.torch_cuda_randn(0, (3, 4)), seed_0, rtol=0, atol=6e-7)
    # flashinfer's documentation, torch.manual_seed(42); torch.randn(2, 5, device="cuda")
    seed_42 = [
        [0.1940, 2.1614, -0.1721, 0.8491, -1.9244],
        [0.6530, -0.6494, -0.8175, 0.5280, -1.2753],
    ]
    np.testing.assert_allclose(noise.torch_cuda_randn(42, (2, 5)), seed_42, rtol=0, atol=5.1e-5)


@pytest.mark.parametrize("size", [1, 200, 1024, 4 * 1024, 4 * 1024 + 1, 9001])
def test_torch_cuda_layout_equals_one_thread_at_a_time(size):
    """2 multiprocessors of 512 threads: 4 blocks at most, so large sizes take several steps."""
    seed = 2**40 + 77
    threads = min(-(-size // 256), 4) * 256
    expected = np.full(size, np.nan)
    for thread in range(threads):
        step = 0
        while 4 * step * threads + thread < size:
            counter = tuple(np.array([word], np.uint32) for word in (step, 0, thread, 0))
            key = (seed % 2**32, seed // 2**32)
            x = [int(word[0]) for word in noise.philox4x32(counter, key)]
            for k in range(4):
                element = (4 * step + k) * threads + thread
                if element < size:
                    pair = 2 * (k // 2)
                    radius = np.sqrt(-2 * np.log((x[pair] + 0.5) * 2**-32))
                    angle = 2 * np.pi * (x[pair + 1] + 0.5) * 2**-32
                    expected[element] = radius * (np.cos(angle) if k % 2 else np.sin(angle))
            step += 1
    found = noise.torch_cuda_randn(seed, (size,), multiprocessors=2, threads_per_multiprocessor=512)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6)


def test_torch_cuda_depends_on_the_gpu_only_beyond_its_threads():
    a100 = {"multiprocessors": 108}
    small, large = (108 * 2048,), (108 * 2048 + 1,)
    assert_same_bits(noise.torch_cuda_randn(5, small), noise.torch_cuda_randn(5, small, **a100))
    h100_value = noise.torch_cuda_randn(5, large)[-1]
    assert noise.torch_cuda_randn(5, large, **a100)[-1] != h100_value


# ------------------------------------------------------------------------------- the common entry


@pytest.mark.parametrize("kind", ["torch_cpu", "torch_cuda"])
def test_torch_kinds_are_transposed_to_channels_last(kind):
    found = noise.initial_noise(kind, 9, **SIZES)
    randn = getattr(noise, f"{kind}_randn")
    expected = randn(9, (2, 4, 6, 5))
    assert found.flags.c_contiguous
    assert found[1, 2, 3, 0] == expected[1, 0, 2, 3]
    assert_same_bits(found, np.ascontiguousarray(np.moveaxis(expected, 1, 3)))


def test_jax_kind_is_jax_random_normal_of_seed_and_index():
    found = noise.initial_noise("jax", 9, **SIZES)
    key = jax.random.fold_in(jax.random.key(9, impl="threefry2x32"), 1)
    np.testing.assert_allclose(found[1], jax.random.normal(key, (6, 5, 4)), rtol=0, atol=1e-6)


def test_jax_kind_gives_an_image_whatever_the_batch():
    five, two = (noise.initial_noise("jax", 9, **SIZES | {"num_images": n}) for n in (5, 2))
    assert_same_bits(five[:2], two)
    assert np.unique(five).size > 0.99 * five.size


@pytest.mark.parametrize("kind", noise.KINDS)
def test_moments_and_seeds(kind):
    sizes = {"num_images": 4, "height": 32, "width": 32, "channels": 4}
    seeds = [0, 1, 2**32, 2**32 + 1, 2**63, np.uint32(7)]
    draws = [noise.initial_noise(kind, seed, **sizes) for seed in seeds]
    for draw in draws:
        assert draw.dtype == np.float32
        assert draw.shape == (4, 32, 32, 4)
        assert abs(draw.mean()) < 4 / draw.size**0.5
        assert abs(draw.std() - 1) < 4 / (2 * draw.size) ** 0.5
    # torch on the CPU keeps the low 32 bits of a seed only; the others keep all 64.
    assert np.array_equal(draws[0], draws[2]) == (kind == "torch_cpu")
    assert np.array_equal(draws[1], draws[3]) == (kind == "torch_cpu")
    assert not np.array_equal(draws[0], draws[1])


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "7", None, True])
@pytest.mark.parametrize("kind", noise.KINDS)
def test_bad_seed_is_a_user_error(kind, seed):
    with pytest.raises(UserError, match=r"seed: expected an int in \[0, 2\*\*64\); found"):
        noise.initial_noise(kind, seed, **SIZES)


def test_bad_kind_and_sizes_are_user_errors():
    with pytest.raises(UserError, match="jax, torch_cpu, torch_cuda; found 'torch'"):
        noise.initial_noise("torch", 0, **SIZES)
    with pytest.raises(UserError, match=r">= 1; found \(0, 6, 5, 4\)"):
        noise.initial_noise("jax", 0, **SIZES | {"num_images": 0})
    with pytest.raises(UserError, match="1 to 2.*29 - 1 values; found 536870912"):
        noise.torch_cuda_randn(0, (2**29,))


def test_a_part_of_a_larger_set():
    whole = noise.initial_noise("jax", 5, 7, 4, 4, 2)
    np.testing.assert_array_equal(noise.initial_noise("jax", 5, 3, 4, 4, 2, first=4), whole[4:])
    with pytest.raises(UserError, match="noise torch_cpu depends on the whole batch"):
        noise.initial_noise("torch_cpu", 5, 3, 4, 4, 2, first=4)
