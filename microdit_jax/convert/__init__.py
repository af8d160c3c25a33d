"""PyTorch state dicts to Orbax model folders and back, without torch."""
