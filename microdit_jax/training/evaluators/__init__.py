"""Evaluators of a run while it trains, one module each; training/evaluation.py lists them."""
