"""Images and captions to prepared latents."""
