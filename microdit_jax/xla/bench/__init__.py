"""Times training, sampling and their parts on this machine.

The command is `python -m microdit_jax.xla.bench`.
"""
