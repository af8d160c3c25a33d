"""The network, in pure Flax Linen.

One alphabet for every einsum, shape comment and annotation of this package:

  n batch          t image tokens   l caption tokens   d width
  h heads          c head dim       f ffn hidden       e experts
  k slots/expert   p patch side
"""
