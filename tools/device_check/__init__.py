"""One bounded run on one GPU: is what was only compiled for GPUs right there, and how quick is it?

`parts` names every figure, `run` gives each part a process and a time limit of its own, `page`
writes what was found as Markdown. The parts' work: `correct`, `speed`, `kernels`.
"""
