"""Masks written by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit_jax.errors import UserError
from microdit_jax.models import masking

NOISE = jnp.array([[0.9, 0.1, 0.5, 0.3], [0.2, 0.4, 0.1, 0.8]], jnp.float32)


def test_mask_by_hand():
    mask = masking.make_mask(NOISE, 0.5)
    np.testing.assert_array_equal(mask.ids_keep, [[1, 3], [2, 0]])
    np.testing.assert_array_equal(mask.dropped, [[1, 0, 1, 0], [0, 1, 0, 1]])
    assert mask.dropped.dtype == jnp.float32


def test_restore_undoes_drop():
    x = jnp.arange(8, dtype=jnp.float32).reshape(2, 4, 1) + 1
    mask = masking.make_mask(NOISE, 0.5)
    kept = masking.drop_tokens(x, mask)
    np.testing.assert_array_equal(kept[..., 0], [[2, 4], [7, 5]])
    restored = masking.restore_tokens(kept, mask)
    np.testing.assert_array_equal(restored[..., 0], [[0, 2, 0, 4], [5, 0, 7, 0]])


def test_gradients_of_kept_tokens_go_back_to_them():
    mask = masking.make_mask(NOISE, 0.5)
    drop = lambda x: masking.drop_tokens(x, mask)  # noqa: E731
    g = jnp.arange(4, dtype=jnp.bfloat16).reshape(2, 2, 1) + 1
    (found,) = jax.vjp(drop, jnp.zeros((2, 4, 1), jnp.bfloat16))[1](g)
    np.testing.assert_array_equal(found[..., 0], [[0, 1, 0, 2], [4, 0, 3, 0]])
    assert found.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "t, ratio, kept", [(256, 0.75, 64), (16, 0.0, 16), (10, 0.75, 2), (7, 0.5, 3)]
)
def test_num_kept(t, ratio, kept):
    assert masking.num_kept(t, ratio) == kept


def test_a_key_gives_one_mask():
    a, b = (masking.uniform_noise(jax.random.key(k), 4, 64) for k in (1, 1))
    np.testing.assert_array_equal(a, b)
    assert (masking.uniform_noise(jax.random.key(2), 4, 64) != a).any()
    share = masking.make_mask(a, 0.75).dropped.mean(axis=1)
    np.testing.assert_array_equal(share, np.full(4, 0.75, np.float32))


@given(t=st.integers(1, 12), ratio=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 2**31))
@settings(derandomize=True, max_examples=20, deadline=None)
def test_masks_keep_the_smallest_noise_and_can_be_undone(t, ratio, seed):
    rng = np.random.default_rng(seed)
    noise = rng.permuted(np.linspace(0, 0.99, 3 * t).reshape(3, t), axis=None).astype(np.float32)
    kept = math.floor(t * (1 - ratio))
    if kept == 0:
        with pytest.raises(UserError, match=f"keeps none of {t} tokens"):
            masking.num_kept(t, ratio)
        return
    mask = masking.make_mask(jnp.asarray(noise), ratio)
    assert mask.ids_keep.shape == (3, kept) and mask.dropped.shape == (3, t)
    x = rng.normal(size=(3, t, 2)).astype(np.float32)
    restored = masking.restore_tokens(masking.drop_tokens(jnp.asarray(x), mask), mask)
    for n in range(3):
        smallest = np.argsort(noise[n])[:kept]
        # Kept tokens come in the order of their noise, and the rest is dropped.
        np.testing.assert_array_equal(mask.ids_keep[n], smallest)
        np.testing.assert_array_equal(np.flatnonzero(mask.dropped[n] == 0), sorted(smallest))
        assert sorted(np.asarray(mask.ids_restore[n])) == list(range(t))
        # There and back: kept tokens are where they were, dropped ones are zero.
        expected = np.where(np.isin(np.arange(t), smallest)[:, None], x[n], 0)
        np.testing.assert_array_equal(restored[n], expected)
