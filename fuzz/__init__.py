"""Fuzzers of every reader of files and messages from strangers.

`python -m fuzz` mutates a target's corpus, by coverage where the package atheris is installed, by
chance elsewhere; `python -m fuzz.replay` runs the committed corpora alone; `python -m fuzz.seeds`
makes them anew. A target passes where a reader answers, or refuses with the exceptions that it
documents; it fails on any other exception, a signal, 10 s, 2 GB, a process or a network connection
that a file starts, a file opened for writing outside of the target's folder, a module imported, or
a dtype of the process changed.
"""
