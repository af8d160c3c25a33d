"""Processes, devices, and what a machine can do."""
