"""A kept training step is taken by a later start, where all that it depends on is the same."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import res_256_pretrain
from microdit_jax import sharding
from microdit_jax.machine import compilation_cache, executables
from microdit_jax.training import saved_step
from microdit_jax.training.saved_step import SavedStep


class Start:
    """Starts of a small run, each with a step that is traced anew."""

    def __init__(self):
        self.said, self.traced, self.calls = [], 0, 0
        self.config = res_256_pretrain.get_config("runlocal").copy_and_resolve_references()
        self.mesh = sharding.make_mesh(data=1, fsdp=1, expert=1, devices=jax.devices()[:1])

    def __call__(self, rows: int = 4):
        def step(state, batch):
            self.traced += 1
            weight = state["weight"] - 0.1 * batch["latents"].mean()
            return {"weight": weight}, {"loss": jnp.square(weight).sum(), "norms": {"a": weight}}

        self.said.clear()
        self.traced = 0
        run = SavedStep(jax.jit(step, donate_argnums=0), self.config, self.mesh, self.said.append)
        state = {"weight": jnp.arange(3.0)}
        for _ in range(2):
            state, metrics = run(state, {"latents": jnp.ones((rows, 2))})
        return np.asarray(state["weight"]), float(metrics["loss"])


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compilation_cache, "is_enabled", lambda: True)
    monkeypatch.setattr(saved_step, "WORTH_SECONDS", 0.0)
    return Start()


def kept(start) -> pathlib.Path:
    return executables.path_of(saved_step.key_of(start.config, start.mesh))


def test_the_second_start_traces_nothing(start):
    first = start()
    assert start.traced == 1 and not start.said
    assert kept(start).stat().st_mode & 0o777 == 0o600
    assert kept(start).parent.stat().st_mode & 0o777 == 0o700
    second = start()
    assert start.traced == 0 and "took the training step that an earlier start" in start.said[0]
    np.testing.assert_array_equal(first[0], second[0])
    assert first[1] == second[1]
    # What no step depends on.
    start.config.train.steps += 1
    start.config.eval.num_images = 7
    start()
    assert start.traced == 0


@pytest.mark.parametrize(
    "change, reason",
    [
        (
            lambda m: m.setattr(saved_step, "source_hash", lambda: "other"),
            "code of microdit_jax: .* the",
        ),
        (lambda m: m.setattr(jax, "__version__", "0.8.0"), "jax: .* there, 0.8.0 here"),
        (lambda m: m.setenv("XLA_FLAGS", "--none"), "flags: "),
        (lambda m: m.setattr(saved_step, "processor", lambda: ("x", "AVX2")), "processor: "),
    ],
)
def test_it_is_compiled_where_something_differs(start, monkeypatch, change, reason):
    first = start()
    change(monkeypatch)
    assert start()[1] == first[1]
    assert start.traced == 1
    (line,) = start.said
    assert line.startswith("the training step is compiled, though one is kept: " + reason[:4])
    # And it is that one that is kept now.
    start()
    assert start.traced == 0


def test_another_config_has_a_program_of_its_own(start):
    start()
    start.config.optim.learning_rate = 1e-3
    start()
    assert start.traced == 1 and not start.said
    start()
    assert start.traced == 0


def test_other_arguments(start):
    start()
    start(rows=8)
    assert start.traced == 1 and "arguments: " in start.said[0]


def test_damage_and_files_that_others_may_write(start):
    start()
    whole = kept(start).read_bytes()
    for damaged, reason in ((whole[:-9], "damaged"), (b"[]", "cannot be read"), (b"", "read")):
        kept(start).write_bytes(damaged)
        start()
        assert start.traced == 1 and reason in start.said[0]
    for path in (kept(start), kept(start).parent):
        path.chmod(path.stat().st_mode | 0o020)
        start()
        assert start.traced == 1 and "others may have written it" in start.said[0]
        path.chmod(path.stat().st_mode & ~0o022)
    link = kept(start)
    elsewhere = link.rename(link.with_name("elsewhere"))
    link.symlink_to(elsewhere)
    start()
    assert start.traced == 1 and "others may have written it" in start.said[0]


def test_a_program_that_fails_is_not_met_again(start, monkeypatch):
    first = start()

    def fails(*_):
        raise jax.errors.JaxRuntimeError("NOT_FOUND: Function x not found")

    with monkeypatch.context() as patch:
        load = "jax.experimental.serialize_executable.deserialize_and_load"
        patch.setattr(load, lambda *_, **__: fails)
        with pytest.raises(jax.errors.JaxRuntimeError):
            start()
    assert start()[1] == first[1] and start.traced == 1 and not start.said
    start()
    start()
    assert start.traced == 0


def test_a_program_from_the_cache_is_not_kept(start, monkeypatch):
    """Its second copy would lack functions."""
    counts = iter(range(9))
    monkeypatch.setattr(compilation_cache, "hits", lambda: next(counts))
    start()
    assert not kept(start).exists() and start.traced == 1


def test_steps_that_are_not_kept(start, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(saved_step, "WORTH_SECONDS", 100.0)  # quick ones
        start()
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 2)
        start()
    with monkeypatch.context() as patch:
        patch.setattr(compilation_cache, "is_enabled", lambda: False)
        start()
    assert not kept(start).exists() and start.traced == 1
