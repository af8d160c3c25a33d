"""Scores of images: the Fréchet distance and its networks, CLIP score, GenEval."""
