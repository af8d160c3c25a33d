import jax.numpy as jnp
import pytest
from support.checkpoints import (
    abstract,
    assert_same,
    files_of,
    flip,
    largest,
    make_state,
    restore,
    save_steps,
)

from microdit_jax.checkpoints.restore import good_step
from microdit_jax.checkpoints.run import RunCheckpoints
from microdit_jax.checkpoints.step_folders import step_damage
from microdit_jax.errors import UserError


def test_every_file_is_watched(tmp_path):
    """A flipped byte anywhere is noticed, but in the two notes of Orbax that nobody reads."""
    save_steps(tmp_path, 1)
    folder = tmp_path / "checkpoints" / "1"
    assert not step_damage(folder)
    unread = []
    for path in files_of(tmp_path, 1):
        before = path.read_bytes()
        flip(path)
        if not step_damage(folder):
            unread.append(path.name)
            assert_same(restore(tmp_path)[0], make_state(1))
        path.write_bytes(before)
    assert unread == ["_CHECKPOINT_METADATA", "commit_success.txt"]


@pytest.mark.parametrize(
    "harm, words",
    [
        (flip, r"\(contents changed\)"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes instead of"),
        (lambda path: path.unlink(), r"\(missing\)"),
    ],
)
def test_damage_falls_back_and_says_so(tmp_path, capfd, harm, words):
    save_steps(tmp_path, 5, 10)
    path = largest(tmp_path, 10)
    harm(path)
    state, metadata = restore(tmp_path)
    assert_same(state, make_state(5))
    assert metadata["step"] == 5
    name = path.relative_to(tmp_path / "checkpoints" / "10")
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert f"step 10 is damaged: {name} " in line and line.endswith("; using step 5")
    with pytest.raises(UserError, match=f"step 10 is damaged: .*{words}"):
        good_step(tmp_path, 10)


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda path: path.unlink(), "manifest.json is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "manifest.json is damaged"),
        (lambda path: path.write_bytes(b""), "manifest.json is damaged"),
        (
            lambda path: path.write_text('{"files": {"state/_METADATA": 3}}'),
            "manifest.json is damaged",
        ),
    ],
)
def test_a_manifest_that_cannot_be_used(tmp_path, capfd, harm, words):
    save_steps(tmp_path, 5, 10)
    harm(tmp_path / "checkpoints" / "10" / "manifest.json")
    assert_same(restore(tmp_path)[0], make_state(5))
    assert f"step 10 is damaged: {words}; using step 5" in capfd.readouterr().err


def test_all_damaged(tmp_path):
    save_steps(tmp_path, 5, 10)
    flip(largest(tmp_path, 5))
    (tmp_path / "checkpoints" / "10" / "manifest.json").unlink()
    with pytest.raises(UserError, match="found step 10 is damaged: .*; step 5 is damaged: .*;"):
        restore(tmp_path)


def test_another_config_is_told(tmp_path):
    save_steps(tmp_path, 2)
    state = make_state(2)
    params = state.params
    changed = [
        (params | {"bias": jnp.zeros(7)}, r"params/bias float32 \(7,\), found float32 \(5,\)"),
        (params | {"bias": jnp.zeros(5, jnp.bfloat16)}, r"params/bias bfloat16 \(5,\), found fl"),
        ({"bias": params["bias"]}, r"params/blocks_0/experts absent, found .* \(2 arrays differ"),
        (params | {"extra": jnp.zeros(7)}, r"params/extra float32 \(7,\), found absent"),
    ]
    with RunCheckpoints(tmp_path) as checkpoints:
        for other, words in changed:
            with pytest.raises(UserError, match=f"does not fit this config: expected {words}"):
                checkpoints.restore(abstract(state.replace(params=other)))
        with pytest.raises(UserError, match="expected ema/bias absent, found"):
            checkpoints.restore(abstract(state.replace(ema=None)))
