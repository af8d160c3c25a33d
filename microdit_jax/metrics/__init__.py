"""Scores of pictures: the Fréchet distance and its networks, CLIP score, GenEval."""
