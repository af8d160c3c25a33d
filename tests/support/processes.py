"""Processes with simulated devices of their own, started as a cluster would start them."""

import os
import pathlib
import socket
import subprocess
import sys
import textwrap
import threading

from microdit_jax.errors import UserError
from microdit_jax.machine.cluster import Job
from microdit_jax.machine.preflight import preflight

ROOT = pathlib.Path(__file__).parents[2]

PROLOGUE = """
import os, signal, sys, time
import jax, numpy as np
from microdit_jax.commands import boundary
from microdit_jax.errors import UserError
from microdit_jax.machine import hosts, signals
"""


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def start(program: str, *arguments, devices: int = 4, **environment) -> subprocess.Popen:
    """A Python process with its own simulated devices."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, "-c", PROLOGUE + textwrap.dedent(program), *map(str, arguments)],
        env=env | environment, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(processes, timeout=120) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of each; none outlives the test."""
    try:
        texts = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *text) for p, text in zip(processes, texts, strict=True)]


def preflights(*jobs: Job, seconds: float = 1.5) -> list[str]:
    """The error of each job's preflight, all at once; "" where all went well."""
    errors = [""] * len(jobs)

    def check(i):
        try:
            with preflight(jobs[i], seconds):
                pass
        except UserError as error:
            errors[i] = str(error)

    threads = [threading.Thread(target=check, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors
