"""XLA's options and environment by platform."""

import pytest
from support.stand_in_devices import gpus

from microdit_jax import sharding
from microdit_jax.commands import environment
from microdit_jax.errors import UserError
from microdit_jax.machine import compile_options


def test_presets():
    assert "xla_gpu_autotune_level" not in compile_options.compiler_options("gpu")
    assert "xla_gpu_autotune_level" in compile_options.compiler_options(
        "cuda", without_a_device=True
    )
    limit = "xla_gpu_experimental_parallel_collective_overlap_limit"
    for nodes in (1, 2):
        mesh = sharding.make_mesh(devices=gpus(nodes, 8))
        assert (limit in compile_options.step_options(mesh)) == (nodes == 2)
    assert list(compile_options.environment("cuda")) == ["XLA_PYTHON_CLIENT_MEM_FRACTION"]
    with pytest.raises(UserError, match="cuda, tpu, cpu, found 'rocm'"):
        compile_options.environment("rocm")


def test_older_compilers_get_no_option_that_they_refuse(monkeypatch):
    early = "xla_gpu_experimental_collective_start_as_early_as_possible"
    for version, known in (("0.8.0", False), ("0.10.1", False), ("0.10.2", True), ("0.11", True)):
        monkeypatch.setattr("importlib.metadata.version", lambda package, v=version: v)
        options = compile_options.compiler_options("cuda", across_slices=True)
        assert (early in options) == known and len(options) > 2


def test_the_preset_for_cpus_takes_tcmalloc_where_it_is(monkeypatch, capsys):
    name = "libtcmalloc_minimal.so.4"
    monkeypatch.setattr("ctypes.util.find_library", lambda wanted: None)
    environment.main(["cpu"])
    out, err = capsys.readouterr()
    assert out == "export GLIBC_TUNABLES=glibc.malloc.hugetlb=1\n"
    assert "apt install libtcmalloc-minimal4" in err

    monkeypatch.setattr("ctypes.util.find_library", lambda wanted: name)
    monkeypatch.setenv("LD_PRELOAD", f"libother.so {name}")
    environment.main(["cpu"])
    out, err = capsys.readouterr()
    assert out.startswith(f"export LD_PRELOAD='{name} libother.so'\n") and not err
