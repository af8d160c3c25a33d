"""Turns images and captions into prepared latents, which `data/` reads."""
