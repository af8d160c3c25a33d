"""Ahead-of-time compilation: what a program needs on a machine that is not here.

The command is `python -m microdit_jax.xla.aot`.
"""
