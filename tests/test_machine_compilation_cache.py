"""Compiled programs are kept, where all processes of a job find them, and not without a limit."""

import os
import re

import pytest
from support.processes import finish, free_port, start

from microdit_jax.machine import compilation_cache

PROGRAM = """
from pathlib import Path
from microdit_jax.machine import compilation_cache
from jax._src import cache_key
# On CPUs the description of the devices, which is part of a program's key, differs by process.
cache_key._hash_accelerator_config = lambda hash_obj, *_: hash_obj.update(b"the same")
compilation_cache.enable()
hosts.initialize(sys.argv[1], 2, int(sys.argv[2]), timeout_seconds=60.0)
compilation_cache.share(Path(sys.argv[3]), sys.argv[4] or None)
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rows = jax.make_array_from_callback(
    (8, 4), jax.NamedSharding(mesh, jax.P("data")), np.ones((8, 4), np.float32).__getitem__
)
jax.block_until_ready(jax.jit(lambda x: x @ x.T)(rows))
print(compilation_cache.compiled_programs())
"""


@pytest.mark.parametrize("chosen", [False, True])
def test_each_process_of_a_job_starts_from_the_workdir(tmp_path, chosen):
    """Process 1 has a cache folder of its own, as on another host, in which nothing is."""
    workdir = tmp_path / "run"

    def run(secret: str = "") -> list[str]:
        address = f"localhost:{free_port()}"
        environment = [{"XDG_CACHE_HOME": str(tmp_path / f"host{number}")} for number in range(2)]
        if chosen:
            for values in environment:
                values["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "elsewhere")
                values["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        results = finish(
            [start(PROGRAM, address, i, workdir, secret, **environment[i]) for i in range(2)]
        )
        assert [status for status, _, _ in results] == [0, 0], results
        return [out[out.index("; ") :].strip() for _, out, _ in results]

    run()
    # Naming the folder takes programs too, which process 0 alone had kept before.
    assert [re.match(r"; 0 programs compiled, [1-9]", line) is not None for line in run()] == [
        True
    ] * 2
    if chosen:
        assert not workdir.exists()
        return
    (folder,) = os.listdir(workdir)
    assert folder.startswith("compiled-")
    # Without the secret nobody can have put programs where this job looks for them.
    assert "; 1 programs compiled" in run("another")[0]
    assert len(os.listdir(workdir)) == 2


def test_the_oldest_programs_go(tmp_path):
    for number in range(5):
        path = tmp_path / f"program{number}"
        path.write_bytes(bytes(100))
        os.utime(path, (10**9 + number, 10**9 + number))
    compilation_cache.trim(tmp_path, max_bytes=250)
    assert sorted(os.listdir(tmp_path)) == ["program3", "program4"]
    compilation_cache.trim(tmp_path / "absent")
