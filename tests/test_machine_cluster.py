"""The environments of schedulers, as they were recorded: which process, of how many, which GPUs."""

import re

import pytest
from jax._src.clusters import cloud_tpu_cluster

from microdit_jax.errors import UserError
from microdit_jax.machine.cluster import Job, find_job, own_gpus, tasks_on_node

SLURM = {
    "SLURM_JOB_ID": "70001", "SLURM_STEP_NODELIST": "gpu[07-09]", "SLURM_NTASKS": "24",
    "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_TASKS_PER_NODE": "8(x3)", "SLURM_PROCID": "19",
    "SLURM_LOCALID": "3", "SLURM_NODEID": "2", "SLURM_GPUS_ON_NODE": "8",
}  # fmt: skip
ADDRESS = f"gpu07:{65535 - 4096 + 1 + 70001 % 4096}"
EIGHT = "0,1,2,3,4,5,6,7"


@pytest.fixture
def environment(monkeypatch):
    """Sets an environment, and nothing of this machine's own scheduler beside it."""

    def set_all(values):
        for name in ("SLURM_JOB_ID", "OMPI_COMM_WORLD_SIZE", "PMI_RANK", "JOB_COMPLETION_INDEX"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.mark.parametrize(
    "case, changes, ids",
    [
        ("one task a node", {"SLURM_STEP_TASKS_PER_NODE": "1(x3)", "SLURM_LOCALID": "0"}, None),
        ("eight tasks see all GPUs", {"CUDA_VISIBLE_DEVICES": EIGHT}, [3]),
        ("each task sees its own", {"CUDA_VISIBLE_DEVICES": "0"}, None),
        ("by the bus", {"CUDA_VISIBLE_DEVICES": "GPU-8ee", "SLURM_GPUS_PER_TASK": "1"}, None),
        ("bound, not listed", {"SLURM_TRES_PER_TASK": "cpu=8,gres/gpu=1"}, None),
        ("nobody says", {}, [3]),
        (
            "four tasks see all GPUs",
            {"SLURM_STEP_TASKS_PER_NODE": "4(x3)", "CUDA_VISIBLE_DEVICES": EIGHT},
            [6, 7],
        ),
        (
            "four tasks of two GPUs each",
            {"SLURM_STEP_TASKS_PER_NODE": "4(x3)", "CUDA_VISIBLE_DEVICES": "0,1"},
            None,
        ),
        (
            "uneven nodes, one task on this one",
            {"SLURM_STEP_TASKS_PER_NODE": "8(x2),1", "CUDA_VISIBLE_DEVICES": EIGHT},
            None,
        ),
        (
            "uneven nodes, two tasks on this one",
            {
                "SLURM_STEP_TASKS_PER_NODE": "1,8,2", "CUDA_VISIBLE_DEVICES": EIGHT,
                "SLURM_LOCALID": "1",
            },
            [4, 5, 6, 7],
        ),
    ],
)  # fmt: skip
def test_slurm(environment, monkeypatch, case, changes, ids):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    environment(SLURM | changes)
    assert find_job(None, None, None) == Job(ADDRESS, 24, 19, ids), case


def test_gpus_that_cannot_be_shared():
    odd = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3(x3)", "CUDA_VISIBLE_DEVICES": EIGHT}
    with pytest.raises(UserError, match="the 8 GPUs .* evenly by its 3 processes"):
        own_gpus(odd, 0)


@pytest.mark.parametrize(
    "text, node, tasks",
    [
        ("2(x3),1", "3", 1),
        ("2(x3),1", "0", 2),
        ("2(x3),1", "", None),
        ("4(x2)", "", 4),
        ("", "", None),
    ],
)
def test_tasks_of_a_node(text, node, tasks):
    found = tasks_on_node({"SLURM_STEP_TASKS_PER_NODE": text, "SLURM_NODEID": node})
    assert found == tasks


OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_RANK": "9", "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}  # fmt: skip


def test_open_mpi(environment, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", EIGHT)
    environment(
        OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
    )
    job = find_job(None, None, None)
    assert job is not None
    assert re.fullmatch(r"10\.96\.0\.1:\d+", job.coordinator_address)
    assert (job.num_processes, job.process_id, job.local_device_ids) == (16, 9, [1])


@pytest.mark.parametrize(
    "values, words",
    [
        (OPEN_MPI, "Open MPI says that this is process 9 of 16, but not where process 0 is; give "
                   "--coordinator_address=HOST:PORT --num_processes=16 "
                   "--process_id=$OMPI_COMM_WORLD_RANK"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "0"}, "this is process 0 of 16"),
        ({"PMI_SIZE": "4", "PMI_RANK": "2"}, "MPI says that this is process 2 of 4"),
        ({"JOB_COMPLETION_INDEX": "1"}, "Kubernetes says that this is process 1, but not where"),
    ],
)  # fmt: skip
def test_one_of_several_never_runs_alone(environment, values, words):
    """Open MPI 5 names no address; each process would train by itself, all in one workdir."""
    environment(values)
    with pytest.raises(UserError, match=re.escape(words)):
        find_job(None, None, None, environment=values)


@pytest.mark.parametrize(
    "values", [{}, {"JOB_COMPLETION_INDEX": "0"}, {"PMI_SIZE": "1", "PMI_RANK": "0"}]
)
def test_a_process_alone(environment, values):
    environment(values)
    assert find_job(None, None, None, environment=values) is None


TPU = {
    "TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a-0.tpu,a-1.tpu", "TPU_SKIP_MDS_QUERY": "true",
}  # fmt: skip


@pytest.mark.parametrize(
    "values, processes, number",
    [
        ({}, 2, 1),
        (
            {
                "MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2",
                "MEGASCALE_COORDINATOR_ADDRESS": "job-0-0.job",
            },
            6, 5,
        ),
    ],
)  # fmt: skip
def test_tpu_slices_on_gke(environment, monkeypatch, values, processes, number):
    """A slice of two hosts, and three such slices; a TPU process takes all chips of its host."""
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr("jax._src.clusters.cluster.running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_tpu_env_value_from_metadata", lambda key: None)
    monkeypatch.setattr("socket.gethostbyname", lambda name: "10.0.0.1")
    environment(TPU | values)
    job = find_job(None, None, None, 5.0)
    assert job is not None
    assert (job.num_processes, job.process_id, job.local_device_ids) == (processes, number, None)
    assert job.coordinator_address.startswith("job-0-0.job:" if values else "a-0.tpu:")
