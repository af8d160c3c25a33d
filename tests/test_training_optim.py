"""Schedules of the paper's four stages, clipping and decay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from microdit_jax.errors import UserError
from microdit_jax.training import optim


def test_stage_one_schedule():
    schedule = optim.learning_rate(2.4e-4, warmup_steps=2500, decay_steps=250_000, final_ratio=0.33)
    at = [float(schedule(s)) for s in (0, 1250, 2500, 126_250, 250_000, 260_000)]
    middle = 2.4e-4 * (1 + 0.33) / 2
    np.testing.assert_allclose(at, [0, 1.2e-4, 2.4e-4, middle, 0.792e-4, 0.792e-4], rtol=1e-5)


def test_warm_up_then_constant():
    schedule = optim.learning_rate(8e-5, warmup_steps=500)
    np.testing.assert_allclose(
        [float(schedule(s)) for s in (0, 250, 500, 9999)], [0, 4e-5, 8e-5, 8e-5], rtol=1e-6
    )
    assert float(optim.learning_rate(8e-5)(0)) == np.float32(8e-5)


def test_cosine_must_end_after_the_warm_up():
    with pytest.raises(UserError, match="decay_steps must exceed warmup_steps"):
        optim.learning_rate(1.0, warmup_steps=10, decay_steps=10)


def test_the_rate_is_constant_and_then_falls_in_a_straight_line():
    schedule = optim.learning_rate(
        1.0, warmup_steps=10, decay_steps=100, final_ratio=0.05, linear_steps=20
    )
    found = [float(schedule(step)) for step in (0, 5, 10, 80, 90, 100, 120)]
    np.testing.assert_allclose(found, (0, 0.5, 1, 1, 0.525, 0.05, 0.05), rtol=1e-6)


@pytest.mark.parametrize(("decay", "most"), [(100, 90), (0, 0)])
def test_a_straight_line_fits_between_warm_up_and_end(decay, most):
    with pytest.raises(UserError, match=f"at most the {most} steps .*, found 91"):
        optim.learning_rate(1.0, warmup_steps=10, decay_steps=decay, linear_steps=91)


def test_decay_acts_on_every_parameter():
    params = {"norm": jnp.ones(3), "kernel": jnp.ones((2, 2))}
    optimizer = optim.adamw(optim.learning_rate(0.1), weight_decay=0.5)
    zero = {"norm": jnp.zeros(3), "kernel": jnp.zeros((2, 2))}
    after, _ = optim.apply_gradients(optimizer, zero, optimizer.init(params), params)
    np.testing.assert_allclose(after["norm"], 0.95, rtol=1e-6)
    np.testing.assert_allclose(after["kernel"], 0.95, rtol=1e-6)


def test_adamw_by_hand():
    """Three steps in NumPy float64: clipping by the norm of all, moments, decay, schedule."""
    options = {"weight_decay": 0.3, "clip_norm": 0.5, "b1": 0.8, "b2": 0.95, "eps": 0.01}
    schedule = optim.learning_rate(0.1, warmup_steps=4)
    optimizer = optim.adamw(schedule, **options)
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(2, 3)), "norm": rng.normal(size=3)}
    found = jax.tree.map(jnp.float32, params)
    opt_state = optimizer.init(found)
    first = {name: np.zeros_like(value) for name, value in params.items()}
    second = {name: np.zeros_like(value) for name, value in params.items()}
    for step in range(3):
        grads = {name: (step + 0.2) * np.cos(value) for name, value in params.items()}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        assert (norm > 0.5) == (step > 0)  # the first gradient is not clipped
        rate = 0.1 * step / 4
        for name, grad in grads.items():
            grad = grad * min(1, 0.5 / norm)
            first[name] = 0.8 * first[name] + 0.2 * grad
            second[name] = 0.95 * second[name] + 0.05 * grad**2
            mean = first[name] / (1 - 0.8 ** (step + 1))
            square = second[name] / (1 - 0.95 ** (step + 1))
            update = mean / (np.sqrt(square) + 0.01) + 0.3 * params[name]
            params[name] = params[name] - rate * update
        found, opt_state = optim.apply_gradients(
            optimizer, jax.tree.map(jnp.float32, grads), opt_state, found
        )
    for name, value in params.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5)


def test_a_known_norm_is_used_for_clipping():
    """On a mesh each device has its shards' gradients alone, so their own norm would be wrong."""
    params = {"kernel": jnp.ones((2, 2))}
    optimizer = optim.adamw(optim.learning_rate(0.1), clip_norm=1.0)
    _, state = optim.apply_gradients(
        optimizer, params, optimizer.init(params), params, norm=jnp.float32(10)
    )
    np.testing.assert_allclose(state[1][0].mu["kernel"], 0.1 * 0.1, rtol=1e-6)


@pytest.mark.parametrize(("step", "expected"), [(4, 2.0), (5, 2.0), (6, 1.25)])
def test_average_by_hand(step, expected):
    """Up to its start the average is a copy of the weights, then three quarters of it stay."""
    ema, params = {"w": jnp.ones(2)}, {"w": jnp.full(2, 2.0)}
    found = optim.update_ema(ema, params, jnp.int32(step), smoothing=0.75, start_step=5)
    np.testing.assert_allclose(found["w"], expected, rtol=1e-6)


def test_expert_multiplier_scales_the_experts_alone():
    params = {
        "mlp": {"w1": jnp.ones((2, 3, 4)), "w2": jnp.ones((2, 4, 3))},
        "dense": {"w1": {"kernel": jnp.ones((3, 4))}},
    }
    grads = jax.tree.map(lambda p: 0.01 * p, params)

    def step(multiplier):
        optimizer = optim.adamw(
            optim.learning_rate(0.1), weight_decay=0.5, expert_multiplier=multiplier
        )
        after, state = optim.apply_gradients(optimizer, grads, optimizer.init(params), params)
        return jax.tree.map(lambda a, p: a - p, after, params), state

    (plain, state), (scaled, state_scaled) = step(1.0), step(0.25)
    for name in ("w1", "w2"):
        np.testing.assert_allclose(scaled["mlp"][name], 0.25 * plain["mlp"][name], rtol=1e-6)
    dense = [moved["dense"]["w1"]["kernel"] for moved in (plain, scaled)]
    np.testing.assert_array_equal(*dense)
    assert (dense[0] < 0).all()
    # One state fits every multiplier: it can be changed between two runs.
    jax.tree.map(np.testing.assert_array_equal, state, state_scaled)
