"""Reads the committed corpora, and mutations of them by chance: python -m fuzz.replay [TARGET ...].

Needs no atheris. The first failure ends it: status 1, a signal, or a traceback of where it hung.
"""

import argparse
import random
import resource

from fuzz.run import Runner
from fuzz.targets import MODULES

ADDRESS_SPACE = 4 << 30  # bytes


def main() -> None:
    parser = argparse.ArgumentParser("python -m fuzz.replay", description=__doc__)
    parser.add_argument("targets", nargs="*", default=list(MODULES), metavar="TARGET")
    parser.add_argument("--mutations", type=int, default=0, help="of each corpus")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    for name in options.targets:
        runner, chance = Runner(name), random.Random(1)
        inputs = [file.read_bytes() for file in runner.corpus()]
        for _ in range(options.mutations):
            runner.execute(runner.mutated(chance, inputs))
        runner.close()
        print(f"{name}: {runner.executions} inputs")


if __name__ == "__main__":
    main()
