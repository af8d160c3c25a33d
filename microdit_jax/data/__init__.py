"""Reads prepared latents and captions, in the order in which training sees them."""
