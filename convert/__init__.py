"""Commands that convert and compare checkpoints; the library is microdit_jax.convert."""
