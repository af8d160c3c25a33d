"""Many processes as one run: who takes part, named barriers, and one process deciding for all.

Every wait has a time-out, and its error names the processes that are missing.
"""

import collections
import contextlib
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from microdit_jax.errors import UserError
from microdit_jax.machine.cluster import Job, find_job

BARRIER_SECONDS = 600.0
WORK_SECONDS = 3600.0  # of one process while the others wait
_barriers: collections.Counter[str] = collections.Counter()


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout_seconds: float = 300.0,
    heartbeat_seconds: int = 100,
) -> bool:
    """Joins the processes of a job into one JAX program; call it before anything uses a device.

    What is None comes from the environment: SLURM, Open MPI, a TPU VM slice, GKE. Without flags
    and without any of these, or for a single process, nothing happens.

    Args:
      coordinator_address: "host:port" of process 0, a port that is free there and open to all.
      timeout_seconds: how long to wait for the others, from this process's own start.
      heartbeat_seconds: a process silent for so long is given up, and all others stop.
    Returns:
      True if there are several processes.
    Raises:
      UserError: some flags but not all; processes missing after the time-out, by number; two
        processes with one number.
    """
    job = find_job(coordinator_address, num_processes, process_id, timeout_seconds)
    if job is None or job.num_processes == 1:
        return False
    preflight(job, timeout_seconds)
    # Without GPUs or TPUs, collectives between processes need gloo; others ignore the setting.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        job.coordinator_address,
        job.num_processes,
        job.process_id,
        job.local_device_ids,
        cluster_detection_method="deactivate",  # done above
        initialization_timeout=max(1, int(timeout_seconds)),
        heartbeat_timeout_seconds=heartbeat_seconds,
    )
    return True


@contextlib.contextmanager
def job(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout_seconds: float = 300.0,
    heartbeat_seconds: int = 100,
) -> Iterator[None]:
    """Joins a job (`initialize`) for a command's whole run; errors name the process they are of.

    A Python program that ends normally waits for the others first, for minutes, and they wait for
    its next collective. So the boundary of commands ends a process that failed at once; within
    `heartbeat_seconds` the others notice its silence and stop.
    """
    if not initialize(
        coordinator_address,
        num_processes,
        process_id,
        timeout_seconds=timeout_seconds,
        heartbeat_seconds=heartbeat_seconds,
    ):
        yield
        return
    try:
        yield
    except UserError as error:
        raise UserError(f"process {jax.process_index()}: {error}") from error


# ------------------------------------------------------------------ preflight
def preflight(job: Job, timeout_seconds: float) -> None:
    """Waits until every process of the job has called; process 0 counts, on the coordinator's port.

    jax.distributed.initialize would wait as long, but could not say for whom.

    Raises:
      UserError: on every process that is there, naming the numbers of those that are not.
    """
    host, _, port = job.coordinator_address.rpartition(":")
    deadline = time.monotonic() + timeout_seconds
    if job.process_id == 0:
        fault = _count_processes(int(port), job.num_processes, deadline)
    else:
        fault = _call_process_0(host.strip("[]"), int(port), job, deadline)
    if fault:
        raise UserError(fault)


def _count_processes(port: int, num_processes: int, deadline: float) -> str:
    """Collects the others' calls on process 0 and answers all at once; returns the fault or ""."""
    start, fault = time.monotonic(), ""
    seen: dict[int, str] = {0: socket.gethostname()}
    calls: list[socket.socket] = []
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        server = socket.create_server(
            ("", port), family=family, backlog=num_processes, dualstack_ipv6=dual
        )
    except OSError as error:
        return (
            f"process 0 could not listen on port {port} ({error.strerror}); choose a free one by "
            "--coordinator_address"
        )
    with server, contextlib.ExitStack() as stack:
        while len(seen) < num_processes and not fault and time.monotonic() < deadline:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                call = stack.enter_context(server.accept()[0])
                call.settimeout(5.0)
                name = json.loads(call.makefile().readline())
                number, origin, count = name["process_id"], name["host"], name["num_processes"]
            except (OSError, ValueError, KeyError, TypeError):
                continue  # not one of ours, or gone already
            calls.append(call)
            if count != num_processes:
                fault = (
                    f"expected the same --num_processes everywhere, found {num_processes} on "
                    f"process 0 and {count} on process {number} ({origin})"
                )
            elif number in seen:
                fault = (
                    f"expected one process for each number, found --process_id={number} twice: on "
                    f"{seen[number]} and on {origin}"
                )
            seen[number] = origin
        if not fault and (missing := sorted(set(range(num_processes)) - set(seen))):
            there = ", ".join(f"{number} ({origin})" for number, origin in sorted(seen.items()))
            fault = (
                f"expected {num_processes} processes within {time.monotonic() - start:.0f} s, "
                f"found {there}; missing: {', '.join(map(str, missing))}; look at their logs, and "
                f"whether they reach port {port} here"
            )
        for call in calls:
            with contextlib.suppress(OSError):
                call.sendall(json.dumps({"fault": fault}).encode() + b"\n")
                call.recv(1)  # they hang up first: the port must be free for JAX at once
    return fault


def _call_process_0(host: str, port: int, job: Job, deadline: float) -> str:
    """Calls process 0 until it answers; returns the fault or ""."""
    start = time.monotonic()
    while True:
        try:
            with socket.create_connection((host, port), timeout=5.0) as call:
                name = {"process_id": job.process_id, "num_processes": job.num_processes}
                call.sendall(json.dumps(name | {"host": socket.gethostname()}).encode() + b"\n")
                # Process 0 answers at its own deadline, which may be later than ours.
                call.settimeout(2 * max(1.0, deadline - start))
                return json.loads(call.makefile().readline())["fault"]
        except (OSError, ValueError) as error:
            if time.monotonic() > deadline:
                return (
                    f"process {job.process_id} expected process 0 at {host}:{port} within "
                    f"{time.monotonic() - start:.0f} s, found nobody ({error}); missing: 0; check "
                    "--coordinator_address, that process 0 runs and that its port is open"
                )
            time.sleep(0.2)


# ------------------------------------------------------------------ together
def barrier(name: str, *, timeout_seconds: float = BARRIER_SECONDS) -> None:
    """Waits until every process is here; all must pass the same names in the same order.

    Raises:
      UserError: processes are missing after the time-out, by number.
    """
    if jax.process_count() == 1:
        return
    _barriers[name] += 1
    try:
        wait = ocp.multihost.get_barrier_sync_fn()
        wait(key=f"{name}/{_barriers[name]}", timeout_ms=int(timeout_seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        missing = missing_processes(str(error))
        who = f"missing: {', '.join(map(str, missing))}" if missing else str(error)
        raise UserError(
            f"expected all {jax.process_count()} processes at {name!r} within {timeout_seconds:g} "
            f"s, found some only; {who}; look at their logs, then start all again"
        ) from error


def missing_processes(message: str) -> list[int]:
    """Returns the processes that JAX's coordination service names as late in a barrier's error."""
    late = message.partition("timed out task names:")[2].partition("RPC:")[0]
    # "1, 2" today, "/job:jax_worker/replica:0/task:1, ..." in older versions of JAX
    return sorted({int(number) for number in re.findall(r"(?:^|[\s,]|task:)(\d+)\b", late)})


def from_first(
    name: str, function: Callable[[], Any], *, timeout_seconds: float = WORK_SECONDS
) -> Any:
    """Runs `function` on process 0 alone and returns its value on every process.

    Args:
      name: what the function does, for the time-out's error.
      function: returns what JSON can hold.
      timeout_seconds: how long it may take, such as for checking a large checkpoint.
    Raises:
      UserError: what the function raised on process 0, raised on every process.
    """
    if jax.process_count() == 1:
        return function()
    text, fault = b"", None
    if jax.process_index() == 0:
        try:
            text = json.dumps({"value": function()}).encode()
        except Exception as error:
            text, fault = json.dumps({"error": f"{error}"}).encode(), error
    barrier(name, timeout_seconds=timeout_seconds)
    length = -len(text) // 4096 * -4096  # few lengths, few compilations
    length = int(multihost_utils.broadcast_one_to_all(np.int32(length)))
    content = np.frombuffer(text.ljust(length), np.uint8)
    content = np.asarray(multihost_utils.broadcast_one_to_all(content))
    answer = json.loads(content.astype(np.uint8).tobytes())
    if fault is not None:
        raise fault
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]
