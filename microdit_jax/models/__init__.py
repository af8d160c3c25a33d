"""The network, in pure Flax Linen, and the one table of its published architectures.

One alphabet for every einsum, shape comment and annotation of this package:

  n batch          t image tokens   l caption tokens   d width
  h heads          c head dim       f ffn hidden       e experts
  k slots/expert   p patch side
"""

from microdit_jax.models.config import ARCHES, SHORT_ARCHES, arch_of

__all__ = ["ARCHES", "SHORT_ARCHES", "arch_of"]
