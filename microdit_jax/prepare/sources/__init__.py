"""Datasets of captioned images, one module each; `registry` opens them by name."""
