"""The commands of the README and of every docs page: found, parsed, and run as written.

`pages` finds them, `rules` says which are not run and why, `parsing` gives each to the real parser
of its command without running it, and `python -m tools.doc_commands` runs the others.
"""
