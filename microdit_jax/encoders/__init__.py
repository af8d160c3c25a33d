"""Frozen towers: what turns pictures into latents and captions into embeddings, and back."""
