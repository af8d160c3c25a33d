"""Makes the committed corpora: python -m fuzz.seeds. The same bytes every time.

Each input is the smallest of its kind: whole files that every branch of a reader needs, and the
hostile ones that were found. What a fuzzer finds goes to corpora/TARGET by hand, with a name that
begins with "found", and stays.
"""
