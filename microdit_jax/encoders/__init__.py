"""Frozen towers: codecs of images, and encoders of texts and images (towers.py)."""
