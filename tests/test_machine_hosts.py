"""Processes on one machine, started as a cluster would start them."""

import re
import socket
import threading
import time

import pytest
from support.processes import finish, free_port, preflights, start

from microdit_jax.errors import UserError
from microdit_jax.machine import hosts
from microdit_jax.machine.cluster import Job


# ------------------------------------------------------------------ who is there
def test_nothing_to_join():
    assert not hosts.initialize()
    assert not hosts.initialize("localhost:1234", 1, 0)
    hosts.barrier("alone")
    assert hosts.from_first("alone", lambda: [1, "two"]) == [1, "two"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (("localhost:1234", None, None), "found no --num_processes, --process_id; give all three"),
        ((None, 2, 1), "found no --coordinator_address;"),
        (("localhost", 2, 1), "must be host:port of process 0, found 'localhost'"),
        (("localhost:1234", 2, 2), "--process_id must be from 0 to 1 for 2 processes, found 2"),
    ],
)
def test_flags_that_cannot_be(flags, words):
    with pytest.raises(UserError, match=words):
        hosts.initialize(*flags)


def test_preflight():
    address = f"localhost:{free_port()}"
    began = time.monotonic()
    jobs = [Job(address, 5, number) for number in range(5)]
    assert preflights(*jobs, seconds=20.0) == [""] * 5
    assert time.monotonic() - began < 10
    assert preflights(*jobs, seconds=20.0) == [""] * 5  # the port is free again at once


def test_preflight_names_the_missing():
    address = f"localhost:{free_port()}"
    there = preflights(*[Job(address, 5, number) for number in (0, 1, 3)])
    name = re.escape(socket.gethostname())
    assert len(set(there)) == 1  # the same on every process
    assert re.match(
        rf"expected 5 processes within [12] s, found 0 \({name}\), 1 \({name}\), 3 \({name}\); "
        r"missing: 2, 4; look at",
        there[0],
    )


def test_preflight_without_process_0():
    (error,) = preflights(Job(f"localhost:{free_port()}", 2, 1))
    assert "process 1 expected process 0 at localhost" in error and "missing: 0; check" in error


def test_preflight_finds_confusion():
    address = f"localhost:{free_port()}"
    errors = preflights(*[Job(address, 4, number) for number in (0, 1, 1)])
    assert "found --process_id=1 twice" in errors[0] == errors[1] == errors[2]
    errors = preflights(Job(address, 3, 0), Job(address, 2, 1))
    assert "found 3 on process 0 and 2 on process 1" in errors[0] == errors[1]
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        errors = preflights(Job(f"localhost:{port}", 2, 0))
        assert f"process 0 could not listen on port {port}" in errors[0]


def test_what_is_not_a_process_of_ours_is_ignored():
    port, errors = free_port(), []
    thread = threading.Thread(
        target=lambda: errors.extend(preflights(Job(f"localhost:{port}", 2, 0)))
    )
    thread.start()
    for content in (b"GET / HTTP/1.1\r\n\r\n", b'{"process_id": 1}\n', b"[]\n"):
        deadline = time.monotonic() + 5
        while True:
            try:
                with socket.create_connection(("localhost", port), timeout=1) as call:
                    call.sendall(content)
                break
            except OSError:
                assert time.monotonic() < deadline
    thread.join()
    assert "; missing: 1;" in errors[0]


# ------------------------------------------------------------------ together
def test_two_processes_as_slurm_starts_them():
    program = """
    assert hosts.initialize(timeout_seconds=60.0)
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 8, 4)
    hosts.barrier("twice", timeout_seconds=30.0)
    hosts.barrier("twice", timeout_seconds=30.0)
    ran = []
    print(hosts.from_first("read", lambda: ran.append(1) or {"é": [1, None] * 3000})["é"][:2], ran)
    def fail():
        raise UserError("expected good, found bad")
    try:
        hosts.from_first("fail", fail)
    except UserError as error:
        print(error)
    """
    job = {
        "SLURM_JOB_ID": str(free_port() % 4096), "SLURM_NTASKS": "2", "SLURM_LOCALID": "0",
        "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    }  # fmt: skip
    results = finish([start(program, **job | {"SLURM_PROCID": str(i)}) for i in range(2)])
    assert [status for status, _, _ in results] == [0, 0], results
    for number, (_, text, _) in enumerate(results):
        # Gloo's threads write a line in pieces, which may come as two.
        gloo = ("[Gloo]", "connected peer ranks")
        lines = [line for line in text.splitlines() if not any(words in line for words in gloo)]
        assert lines == [f"[1, None] {[[1], []][number]}", "expected good, found bad"]


def test_collectives_are_connected_once():
    """Later work opens no connection, for which gloo would wait 30 s; mesh 1x2x2 has groups."""
    program = """
    from jax.sharding import PartitionSpec as P
    from microdit_jax import sharding

    def connections():
        from jax._src import distributed
        return len(distributed.global_state.client.key_value_dir_get_bytes("cpu:gloo"))

    def main(arguments):
        with hosts.job(arguments[0], 2, int(arguments[1]), timeout_seconds=60.0):
            mesh = sharding.make_mesh(1, 2, 2)
            hosts.connect(mesh)
            hosts.barrier("connected")
            before = connections()
            hosts.barrier("counted")
            for axes in ("fsdp", "expert", ("fsdp", "expert"), ("data", "fsdp", "expert")):
                work = jax.shard_map(
                    lambda x: (jax.lax.psum(x, axes), jax.lax.all_gather(x, axes)), mesh=mesh,
                    in_specs=P(), out_specs=P(), check_vma=False,
                )
                jax.block_until_ready(jax.jit(work)(np.ones(4, np.float32)))
            hosts.barrier("done")
            print("opened", before > 0, connections() - before)
    boundary.run_command("__main__")
    """
    address = f"localhost:{free_port()}"
    results = finish([start(program, address, number, devices=2) for number in range(2)], 60)
    assert all("opened True 0" in text for _, text, _ in results), results


def test_a_late_process_is_named_and_all_end():
    """The late one too, in the middle of what it does."""
    program = """
    def main(arguments):
        number = int(arguments[1])
        with hosts.job(arguments[0], 3, number, timeout_seconds=60.0):
            assert jax.device_count() == 3
            if number == 2:
                time.sleep(300)
            hosts.barrier("save", timeout_seconds=2.0)
    boundary.run_command("__main__")
    """
    address = f"localhost:{free_port()}"
    results = finish([start(program, address, number, devices=1) for number in range(3)], 60)
    for status, _, text in results:
        assert status == 75, results
        assert re.search(
            r"^process [01] \(.+\): expected all 3 processes at 'save' within 2 s, found "
            "some only; missing: 2; look at their logs, then start all again\n$", text,
        )  # fmt: skip


def test_names_in_the_error_of_a_barrier():
    old = "Some timed out task names:\n/job:jax_worker/replica:0/task:1, /job:w/replica:0/task:12"
    assert hosts.missing_processes(old) == [1, 12]
    assert hosts.missing_processes("first task: 3. timed out task names: 1, 2 RPC: /x.9/B") == [
        1,
        2,
    ]
    assert hosts.missing_processes("connection lost") == []


def test_a_missing_process_ends_the_others():
    """The preflight of the real command: process 1 of 2 never comes."""
    program = """
    def main(arguments):
        with hosts.job(arguments[0], 2, 0, timeout_seconds=2.0):
            raise AssertionError("not to be reached")
    boundary.run_command("__main__")
    """
    ((status, _, text),) = finish([start(program, f"localhost:{free_port()}")])
    assert status == 75
    assert "expected 2 processes within 2 s, found 0" in text and "; missing: 1; look" in text
