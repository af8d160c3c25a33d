"""Data: sources of latents and captions, and the order in which training sees them."""
