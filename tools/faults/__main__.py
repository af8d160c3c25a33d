"""Runs faults of a job of two hosts, one after another, and prints what became of each as a table.

Each host is a network namespace with an address and a name of its own, so only root can run this:

  python -m tools.faults --data=/tmp/faults/data [--rows=kill;link] [--out=table.md]

The data are made where there are none. A row takes one to three minutes, and no more than twenty
on a machine that others use.
"""

import argparse
import importlib
import os
import pathlib
import subprocess
import tempfile

from tools.faults.hosts import Job, make_data, network
from tools.faults.rows import HEADER, ROWS, shown

for _module in ("silence", "disks", "beginnings"):
    importlib.import_module(f"tools.faults.{_module}")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("/tmp/faults/data"))
    parser.add_argument("--rows", default="", help="words of the rows' names, with semicolons")
    parser.add_argument("--out", type=pathlib.Path, help="a file that rows are added to")
    args = parser.parse_args()
    if os.getuid():
        parser.error("network namespaces need root")
    if not args.data.exists():
        make_data(args.data)
    chosen = [n for n in ROWS if any(word in n for word in args.rows.split(";"))]
    print(HEADER, flush=True)
    with network():
        for position, name in enumerate(chosen):
            function, settings = ROWS[name]
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                job = Job(args.data, pathlib.Path(folder), 9100 + 2 * position, **settings)
                try:
                    line = shown(job, name, function(job))
                except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                    line = f"| {name} | | | not run: {error} | |"
                finally:
                    job.finish(0)
            print(line, flush=True)
            if args.out:
                with args.out.open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
