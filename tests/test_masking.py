"""Masks written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


@pytest.mark.parametrize("t, ratio, kept", [(256, 0.75, 64), (16, 0.0, 16), (10, 0.75, 2)])
def test_num_kept(t, ratio, kept):
    assert masking.num_kept(t, ratio) == kept


def test_a_key_gives_one_mask():
    a, b = (masking.uniform_noise(jax.random.key(k), 4, 64) for k in (1, 1))
    np.testing.assert_array_equal(a, b)
    assert (masking.uniform_noise(jax.random.key(2), 4, 64) != a).any()
    share = masking.make_mask(a, 0.75).dropped.mean(axis=1)
    np.testing.assert_array_equal(share, np.full(4, 0.75, np.float32))
