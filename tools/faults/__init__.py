"""Faults of a job of two hosts, put in one after another: tools that take minutes, not tests."""
