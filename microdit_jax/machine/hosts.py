"""Many processes as one run: who takes part, named barriers, and one process deciding for all.

Every wait has a time-out, and its error names the processes that are missing.
"""

import atexit
import collections
import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from microdit_jax.errors import Late, UserError
from microdit_jax.files import parse_json
from microdit_jax.machine import interrupts, watch
from microdit_jax.machine.cluster import find_job
from microdit_jax.machine.collective_errors import is_of_another, named
from microdit_jax.machine.coordination import Store, delay_aborts
from microdit_jax.machine.preflight import preflight

BARRIER_SECONDS = 600.0
HEARTBEAT_SECONDS = 25.0  # and a few more until all have ended
WORK_SECONDS = 3600.0  # of one process while the others wait
_barriers: collections.Counter[str] = collections.Counter()


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    job_token: str | None = None,
    timeout_seconds: float = 300.0,
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
) -> bool:
    """Joins the processes of a job into one JAX program; call it before anything uses a device.

    What is None comes from the environment: SLURM, Open MPI, a TPU VM slice, GKE. Without flags
    and without any of these, or for a single process, nothing happens.

    Args:
      coordinator_address: "host:port" of process 0, a port that is free there and open to all.
      job_token: as `find_job` takes it.
      timeout_seconds: how long to wait for the others, from this process's own start.
      heartbeat_seconds: a process silent for so long is given up, and all others end
        (machine.watch).
    Returns:
      True if there are several processes.
    Raises:
      UserError: some flags but not all; two processes with one number.
      Late: processes missing after the time-out, by number.
    """
    job = find_job(
        coordinator_address, num_processes, process_id, timeout_seconds, job_token=job_token
    )
    if job is None or job.num_processes == 1:
        return False
    lifelines = preflight(job, timeout_seconds)
    # Without GPUs or TPUs, collectives between processes need gloo; others ignore the setting.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # machine.signals does its work, and SIGTERM stays Python's.
    jax.config.update("jax_enable_preemption_service", False)
    delay_aborts()
    with lifelines:
        jax.distributed.initialize(
            job.coordinator_address,
            job.num_processes,
            job.process_id,
            job.local_device_ids,
            cluster_detection_method="deactivate",  # done above
            # JAX would abort with pages of C++: the lifelines and the watch speak first.
            initialization_timeout=int(timeout_seconds) + 60,
            heartbeat_timeout_seconds=max(100, int(4 * heartbeat_seconds)),
        )
    watch.Watch(Store(), heartbeat_seconds).start()
    atexit.register(_leave)
    return True


def _leave() -> None:
    """Leaves the job, once all the others do; the watch's threads end, and not in mid-call."""
    if (watching := watch.current()) is not None:
        watching.close()
        jax.distributed.shutdown()
        watching.join()


@contextlib.contextmanager
def job(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    job_token: str | None = None,
    timeout_seconds: float = 300.0,
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
) -> Iterator[None]:
    """Joins a job (`initialize`) for a command's whole run, which all processes end together.

    What ends one process ends the others in seconds, with its line: the watch has a thread in each
    that ends the process from within whatever it does.
    """
    if not initialize(
        coordinator_address,
        num_processes,
        process_id,
        job_token=job_token,
        timeout_seconds=timeout_seconds,
        heartbeat_seconds=heartbeat_seconds,
    ):
        yield
        return
    watching = watch.current()
    assert watching is not None
    try:
        yield
        # No process leaves while another could still need it, or fail.
        barrier("the end", timeout_seconds=WORK_SECONDS)
    except interrupts.Stopped as error:
        watching.stopped_by(error.number)
        raise
    except Exception as error:
        if isinstance(error, FaultOfFirst):
            watching.wait_for_verdict(2 * watch.BEAT_SECONDS)
        elif is_of_another(error):
            watching.wait_for_verdict()
            error = named(error, watching.goes_on())
        watch.report(error)
        watching.wait_for_verdict(2 * watch.BEAT_SECONDS)
        raise error
    _leave()


# ------------------------------------------------------------------ together
def barrier(name: str, *, timeout_seconds: float = BARRIER_SECONDS) -> None:
    """Waits until every process is here; all must pass the same names in the same order.

    Raises:
      Late: processes are missing after the time-out, by number.
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
        raise Late(
            f"expected all {jax.process_count()} processes at {name!r} within {timeout_seconds:g} "
            f"s, found some only; {who}; look at their logs, then start all again"
        ) from error


def missing_processes(message: str) -> list[int]:
    """Returns the processes that JAX's coordination service names as late in a barrier's error."""
    late = message.partition("timed out task names:")[2].partition("RPC:")[0]
    # "1, 2" today, "/job:jax_worker/replica:0/task:1, ..." in older versions of JAX
    return sorted({int(number) for number in re.findall(r"(?:^|[\s,]|task:)(\d+)\b", late)})


def connect(mesh: Mesh) -> None:
    """Opens the connections inside each group of a mesh's devices, while all processes are there.

    gloo, which is the network of CPUs, waits 30 s for a group's processes when it first has work,
    and they may compile that work for minutes longer than each other; later it waits for ever.
    """
    if jax.process_count() == 1 or mesh.devices.flat[0].platform != "cpu":
        return
    axes = [axis for axis in mesh.axis_names if mesh.shape[axis] > 1]
    groups = [g for n in range(len(axes)) for g in itertools.combinations(axes, n + 1)]

    def sums(x: jax.Array) -> list[jax.Array]:
        return [jax.lax.psum(x, group) for group in groups]

    spec, replicated = PartitionSpec(mesh.axis_names), PartitionSpec()
    work = jax.jit(
        jax.shard_map(sums, mesh=mesh, in_specs=spec, out_specs=replicated, check_vma=False)
    )
    ones = jax.make_array_from_callback(
        (mesh.size,), NamedSharding(mesh, spec), lambda index: np.ones(1, np.float32)
    )
    barrier("connect")
    jax.block_until_ready(work(ones))


class FaultOfFirst(UserError):
    """An error of process 0, raised on the others."""


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
    answer, fault = "", None
    if jax.process_index() == 0:
        try:
            answer = json.dumps({"value": function()})
        except Exception as error:
            answer, fault = json.dumps({"error": f"{error}"}), error
    barrier(name, timeout_seconds=timeout_seconds)
    job = watch.current()
    store, key = Store() if job is None else job.store, f"first/{name}/{_barriers[name]}"
    if jax.process_index() == 0:
        store.put(key, answer)
    if fault is not None:
        raise fault
    found = parse_json(answer or store.wait_for(key))
    if "error" in found:
        raise FaultOfFirst(found["error"])
    return found["value"]
