"""Scores of a model by a written protocol: python -m microdit_jax.evaluate, docs/evaluation.md."""
