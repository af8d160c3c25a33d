"""Counts what a compiled program does, from the text of its optimised HLO."""
