"""Errors that come before memory runs out."""

import jax
import jax.numpy as jnp
import pytest

from microdit_jax.errors import UserError
from microdit_jax.machine import memory


def test_too_much_for_the_host(monkeypatch):
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 5 * 10**9)
    memory.check_host(5 * 10**9, what="a list", fix="ask for less")
    with pytest.raises(UserError) as caught:
        memory.check_host(10**12, what="a list of 3 images", fix="ask for fewer")
    assert str(caught.value) == (
        "a list of 3 images needs 1,000.0 GB of memory, found 5.0 GB free; ask for fewer"
    )
    monkeypatch.setattr(memory, "free_host_bytes", lambda: None)  # no Linux
    memory.check_host(10**30, what="a list", fix="ask for less")


def test_memory_that_is_free():
    assert memory.free_bytes(jax.devices()[0]) > 10**6
    assert memory.free_host_bytes() < 10**15


def test_a_program_that_does_not_fit(monkeypatch):
    """XLA says what it needs beside its arguments: the batch that would fit is their share."""
    x = jax.ShapeDtypeStruct((1000, 1000), jnp.float32)
    compiled = jax.jit(lambda x: x + 1).lower(x).compile()  # 4 MB of result
    needed = 8 * 4_000_000  # simulated devices share the host's memory
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed)
    shards = len(jax.tree.leaves(compiled.input_shardings)[0].addressable_devices)
    memory.check_fit(compiled, rows=1000, what="--batch_size")
    monkeypatch.setattr(memory, "free_bytes", lambda device: shards * 1_000_000)
    with pytest.raises(UserError, match=r"--batch_size=1000 needs .*=2\d\d would fit"):
        memory.check_fit(compiled, rows=1000, what="--batch_size")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10)
    with pytest.raises(UserError, match="not even one image a device fits"):
        memory.check_fit(compiled, rows=1000, what="--batch_size")
