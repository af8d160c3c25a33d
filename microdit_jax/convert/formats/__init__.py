"""Reads and writes .pt and .safetensors files without torch."""
