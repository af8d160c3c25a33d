"""Checkpoints between PyTorch's files and this project's Orbax model folders; needs no PyTorch."""
