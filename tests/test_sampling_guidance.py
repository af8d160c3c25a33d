"""Guidance: its default scale, and the guided network."""

import jax.numpy as jnp
import numpy as np

from microdit_jax.encoders.token_table import TokenTable
from microdit_jax.sampling import guidance


def test_default_scale():
    class Tower(TokenTable):
        pretrained = True

    assert guidance.default_scale(TokenTable(24, 7, 0)) == 3.0  # emoji
    assert guidance.default_scale(Tower(24, 7, 0)) == 5.0  # the reference's


def test_guidance_by_hand():
    """Rows alternate: with caption, without; scale 3 goes three times the way between them."""
    caption = guidance.interleave(jnp.array([5.0, 7.0]), jnp.zeros(2))

    def network(x, c_noise):
        return x * c_noise[:, None, None, None] + caption[:, None, None, None]

    x = jnp.arange(8.0).reshape(2, 2, 2, 1)
    found = guidance.guided(network, 3.0)(x, jnp.array([1.0, 2.0]))
    expected = np.asarray(x) * np.array([1, 2]).reshape(2, 1, 1, 1)
    expected = expected + 3 * np.array([5, 7]).reshape(2, 1, 1, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
