"""Commands of SLURM on one machine: srun sets the variables of each task and starts it.

A job script finds `srun`, `scontrol` and `scancel` in a folder for PATH. The latter two note in
calls.txt what they were asked; scancel kills the tasks.
"""

import os
import pathlib
import stat
import sys

SRUN = """#!{python}
import os, subprocess, sys

command = sys.argv[1:]
while command[0].startswith("-"):
    command.pop(0)
count = int(os.environ["SLURM_NTASKS"])
tasks = []
for number in range(count):
    own = {{"SLURM_PROCID": str(number), "SLURM_LOCALID": "0", "SLURM_NODEID": str(number)}}
    tasks.append(subprocess.Popen(command, env=os.environ | own))
with open("{folder}/tasks", "w") as file:
    print(*[task.pid for task in tasks], file=file)
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
CALL = """#!/bin/bash
echo "$(basename $0) $*" >> {folder}/calls.txt
"""


def install(folder: pathlib.Path, *, tasks: int = 2) -> dict[str, str]:
    """Writes the commands, and returns the environment of a job of so many nodes."""
    bin = folder / "bin"
    bin.mkdir(parents=True)
    scripts = {
        "srun": SRUN,
        "scontrol": CALL,
        "scancel": CALL + "kill -KILL $(cat {folder}/tasks)\n",
    }
    for name, text in scripts.items():
        path = bin / name
        path.write_text(text.format(python=sys.executable, folder=folder))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return os.environ | {
        "PATH": f"{bin}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(os.getpid()),  # in the name of the health file
        "SLURM_NTASKS": str(tasks),
        "SLURM_JOB_NUM_NODES": str(tasks),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": f"1(x{tasks})",
    }


def calls(folder: pathlib.Path) -> list[str]:
    """Lines of what scontrol and scancel were asked."""
    path = folder / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []
