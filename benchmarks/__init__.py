"""Measurements that take minutes, each a command: python -m benchmarks.NAME."""
