"""The job that a process belongs to, by its flags or by what the scheduler tells it.

JAX knows SLURM, Open MPI up to 4, Kubernetes (with the package `kubernetes`) and TPU VMs; which of
a node's GPUs a process may take, it gets wrong where several processes share a node, and is decided
here.
"""

import dataclasses
import os
import re
from collections.abc import Mapping

from jax._src.clusters import ClusterEnv  # the detection that jax.distributed.initialize runs

from microdit_jax.errors import UserError

# Who tells a process its number, where nobody tells it where process 0 is.
NUMBERED = (
    ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("MPI", "PMI_SIZE", "PMI_RANK"),
    ("Kubernetes", "", "JOB_COMPLETION_INDEX"),
)
# What schedulers call a job, the same for all of its processes
NAMES = ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri")


@dataclasses.dataclass(frozen=True)
class Job:
    """One process of a job.

    Attributes:
      coordinator_address: "host:port" where process 0 listens.
      num_processes: how many processes the job has.
      process_id: number of this one, from 0.
      local_device_ids: which of the GPUs that it sees are its own; None: all.
      token: a text that the job's processes alone know; "" for none.
    """

    coordinator_address: str
    num_processes: int
    process_id: int
    local_device_ids: list[int] | None = None
    token: str = dataclasses.field(default="", repr=False, compare=False)


def find_job(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    timeout_seconds: float = 300.0,
    environment: Mapping[str, str] = os.environ,
    *,
    job_token: str | None = None,
) -> Job | None:
    """Returns the job that flags or else the cluster's environment describe, None without one.

    Args:
      environment: only for what JAX does not find out; JAX itself reads the process's own.
      job_token: a text that the job's processes alone know, the same for all; None: the scheduler's
        name for a job that the environment describes, else none.
    Raises:
      UserError: some of the flags but not all, values that no job can have, or one process of
        several that is not told where the others are.
    """
    flags = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in flags.items() if value is None]
    ids, token = None, job_token or ""
    if len(missing) == 3:
        try:
            coordinator_address, num_processes, process_id, local = (
                ClusterEnv.auto_detect_unset_distributed_params(
                    None, None, None, None, None, max(1, int(timeout_seconds))
                )
            )
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(
                f"expected the cluster's environment to describe the job, found {error}; give "
                f"{', '.join(flags)} instead, for one process --num_processes=1 --process_id=0 "
                "--coordinator_address=localhost:1234"
            ) from error
        if coordinator_address is None or num_processes is None or process_id is None:
            _check_alone(environment, flags)
            return None
        if job_token is None:
            token = next((environment[name] for name in NAMES if environment.get(name)), "")
        if local is not None:
            ids = own_gpus(environment, next(iter(local)))
    elif missing:
        raise UserError(
            f"expected {', '.join(flags)} together, found no {', '.join(missing)}; give all three, "
            "or none on SLURM, GKE and TPU VMs"
        )
    assert coordinator_address and num_processes is not None and process_id is not None
    port = re.fullmatch(r".+:(\d{1,5})", coordinator_address, re.ASCII)
    if not port or not 0 < int(port[1]) < 2**16:
        raise UserError(
            f"--coordinator_address must be host:port of process 0, found {coordinator_address!r}"
        )
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id must be from 0 to {num_processes - 1} for {num_processes} processes, "
            f"found {process_id}"
        )
    return Job(coordinator_address, num_processes, process_id, ids, token)


def _check_alone(environment: Mapping[str, str], flags: Mapping[str, object]) -> None:
    """Raises UserError where a launcher says that this process is one of several."""
    for launcher, size, rank in NUMBERED:
        number, count = environment.get(rank, ""), environment.get(size, "")
        if number.isdigit() and (number != "0" or (count.isdigit() and int(count) > 1)):
            known = f" --num_processes={count}" if count else ""
            raise UserError(
                f"{launcher} says that this is process {number}{' of ' * bool(count)}{count}, but "
                f"not where process 0 is; give --coordinator_address=HOST:PORT{known} "
                f"--process_id=${rank}, for a process alone --num_processes=1 --process_id=0 "
                "--coordinator_address=localhost:1234"
            )


# ------------------------------------------------------------------ GPUs of a node
def own_gpus(environment: Mapping[str, str], local_rank: int) -> list[int] | None:
    """Returns which of the GPUs that a process sees are its own, None for all.

    SLURM shows each task the node's GPUs, or only its own where they are bound to tasks
    (--gpus-per-task, --gpu-bind); the latter are numbered from 0 again, so that the task's own
    number on the node is no device.

    Args:
      local_rank: number of the process on its node.
    Raises:
      UserError: the node's GPUs cannot be shared evenly.
    """
    tasks = tasks_on_node(environment)
    if tasks == 1:
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        bound = any(name in environment for name in ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK"))
        return None if bound else [local_rank]
    count = len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    on_node = environment.get("SLURM_GPUS_ON_NODE", "")
    if count <= 1 or (on_node.isdigit() and count < int(on_node)):
        return None  # bound: they are this task's own
    if "SLURM_GPUS_PER_TASK" in environment and not on_node:
        return None
    if tasks is None:
        return [local_rank]
    if count % tasks:
        raise UserError(
            f"expected the {count} GPUs of this node to be shared evenly by its {tasks} processes; "
            "start as many as divide them, or bind GPUs to tasks (srun --gpus-per-task)"
        )
    each = count // tasks
    return list(range(local_rank * each, (local_rank + 1) * each))


def tasks_on_node(environment: Mapping[str, str]) -> int | None:
    """Returns how many processes of the job are on this node; None where nobody says.

    SLURM lists the counts of all nodes, as "2(x3),1" for four of them.
    """
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        counts: list[int] = []
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get(name, "")):
            counts += [int(count)] * int(times or 1)
        if counts:
            node = environment.get("SLURM_NODEID", "")
            if node.isdigit() and int(node) < len(counts):
                return counts[int(node)]
            return counts[0] if len(set(counts)) == 1 else None
    size = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "")
    return int(size) if size.isdigit() else None
