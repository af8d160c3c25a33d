"""Students: the teacher's trajectories and the loss against their definitions, and whole runs."""

import dataclasses
import functools
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_l2, tiny_model
from support.processes import free_port
from support.tiny_student import get_config
from support.train_command import Command, last_step, lines, state_of
from test_train import tiny_config

from microdit_jax import diffusion, sharding
from microdit_jax.checkpoints.run import read_run_metadata
from microdit_jax.create import load
from microdit_jax.diffusion import EdmConfig
from microdit_jax.errors import UserError
from microdit_jax.models import dit
from microdit_jax.models.dit import DiT
from microdit_jax.sampling.schedules import dense_levels
from microdit_jax.train import train
from microdit_jax.training import distill, optim
from microdit_jax.training import step as train_step
from microdit_jax.training.loss import sample_randomness

EDM = EdmConfig(P_mean=0.0, P_std=1.6)
RNG = np.random.default_rng(0)
Y = jnp.asarray(RNG.normal(size=(4, 5, 24)), jnp.float32)
LATENTS = jnp.asarray(RNG.normal(size=(4, 8, 8, 4)), jnp.float32)
BATCH = {"latents": LATENTS, "caption_latents": Y, "position": jnp.arange(4)}
KEY = jax.random.key(3)
SETTINGS = {
    "edm": EDM, "guidance_scale": 3.0, "guidance_interval": (0.1, 1.0), "trajectory_steps": 4,
}  # fmt: skip
LOSS = distill.StudentLoss(**SETTINGS)


@functools.cache
def networks():
    """A student's network, and weights of it and of a teacher; none are zero."""
    model = tiny_model()
    model = DiT(dataclasses.replace(model.config, depth=1, patch_mixer_depth=1))
    shapes = dit.abstract_params(model.config)
    normals = np.random.default_rng(1)
    return model, *(
        jax.tree.map(
            lambda leaf: jnp.asarray(normals.normal(0, 0.1, leaf.shape), leaf.dtype), shapes
        )
        for _ in range(2)
    )


# ------------------------------------------------------------------ the teacher's trajectories
def end_of(x, sigma, steps):
    """A trajectory's end where the data is a Gaussian, whose denoiser is known."""

    def denoise(x, sigma):
        wide = sigma[:, None, None, None]
        return x * EDM.sigma_data**2 / (EDM.sigma_data**2 + wide**2)

    return distill.trajectory(denoise, x, sigma, steps)


def test_trajectories_end_where_the_equation_does():
    """x falls with sqrt(sigma_data^2 + sigma^2) from any level; the error by the second order."""
    sigma = jnp.array([0.3, 2.0, 11.0, 80.0])
    x = LATENTS * sigma[:, None, None, None]
    size = EDM.sigma_data / np.sqrt(EDM.sigma_data**2 + np.asarray(sigma) ** 2)
    exact = np.asarray(x) * size[:, None, None, None]
    errors = [relative_l2(end_of(x, sigma, steps).end, exact) for steps in (16, 32, 64)]
    assert errors[0] < 0.05
    assert errors[0] / errors[1] > 3 and errors[1] / errors[2] > 3
    path = end_of(x, sigma, 8)
    assert path.x.shape == (8, *x.shape)
    np.testing.assert_array_equal(path.x[0], x)
    np.testing.assert_array_equal(path.sigma[0], sigma)


@pytest.mark.parametrize("sigma", [0.2, 3.0, 80.0])
def test_levels_are_the_dense_schedules(sigma):
    found = distill.trajectory_levels(jnp.array([sigma, 7.0]), 8)[:, 0]
    expected = dense_levels(8, dataclasses.replace(EDM, sigma_max=sigma))
    np.testing.assert_allclose(found, expected, rtol=5e-3, atol=1e-6)


# ------------------------------------------------------------------ the loss
@functools.partial(jax.jit, static_argnums=0)
def value(loss, params, teacher, batch):
    return loss(networks()[0], params, teacher, batch, KEY)


def test_the_target_is_the_end_of_the_guided_teachers_trajectory():
    """Learns in EDM's weight, from each point but the last quarter, guided in its interval."""
    model, params, teacher = networks()
    random = sample_randomness(KEY, BATCH["position"], model.config)
    sigma = diffusion.training_sigma(random.sigma_normal, EDM)
    apply = jax.jit(lambda p, x, c, y: model.apply({"params": p}, x, c, y)[0])

    def D(params, x, sigma, y):
        return diffusion.denoiser(lambda x, c: apply(params, x, c, y), EDM.sigma_data)(x, sigma)

    acted = []

    def guided(x, sigma):
        acts = (0.1 < sigma) & (sigma <= 1.0)
        acted.extend(np.asarray(acts))
        none = D(teacher, x, sigma, 0 * Y)
        return none + jnp.where(acts, 3.0, 1.0)[:, None, None, None] * (
            D(teacher, x, sigma, Y) - none
        )

    # By hand: Adams-Bashforth of the second order, the first step Euler's
    levels = distill.trajectory_levels(sigma, 4)
    x = LATENTS + sigma[:, None, None, None] * random.noise
    points, before = [], None
    for now, then in zip(levels, levels[1:], strict=False):
        points.append((x, now))
        slope = (x - guided(x, now)) / now[:, None, None, None]
        size = (then - now)[:, None, None, None]
        if before is None:
            x = x + size * slope
        else:
            ratio = size / before[1] / 2
            x = x + size * ((1 + ratio) * slope - ratio * before[0])
        before = slope, size
    assert 0 < sum(acted) < len(acted)
    weighted = []
    for point, now in points[:3]:
        weight = (now**2 + EDM.sigma_data**2) / (now * EDM.sigma_data) ** 2
        error = jnp.square(D(params, point, now, Y) - x).mean(axis=(1, 2, 3))
        weighted.append(weight * error)
    found, found_sigma = value(LOSS, params, teacher, BATCH)
    np.testing.assert_allclose(found_sigma, sigma, rtol=1e-6)
    np.testing.assert_allclose(found, np.mean(weighted, axis=0), rtol=2e-3)


def test_captions_alone_are_enough():
    """Starting from noise alone looks at no image of the batch, and begins at sigma_max."""
    _, params, teacher = networks()
    loss = dataclasses.replace(LOSS, from_noise=True)
    first, sigma = value(loss, params, teacher, BATCH)
    other, _ = value(loss, params, teacher, BATCH | {"latents": 0 * LATENTS})
    np.testing.assert_array_equal(first, other)
    np.testing.assert_array_equal(sigma, EDM.sigma_max)


def test_micro_batches_and_meshes_change_nothing():
    model, params, teacher = networks()
    schedule = optim.learning_rate(1e-3)
    optimizer = optim.adamw(schedule)
    found = []
    batch = {key: np.concatenate([np.asarray(value)] * 2) for key, value in BATCH.items()}
    del batch["position"]
    loss = dataclasses.replace(LOSS, trajectory_steps=2)
    for mesh, parts in ((None, 2), (sharding.make_mesh(2, 2, 2), 1)):
        state = train_step.TrainState.create(params, optimizer, with_ema=True)
        weights = teacher
        rows = {key: jnp.asarray(value) for key, value in batch.items()}
        if mesh is not None:
            state = jax.device_put(state, sharding.shardings(state, mesh))
            weights = jax.device_put(teacher, sharding.shardings(teacher, mesh))
            rows = sharding.put_batch(batch, mesh)
        step = train_step.make_train_step(
            model, optimizer, schedule, edm=EDM, mask_ratio=0.0, seed=1, ema_smoothing=0.9,
            ema_start_step=0, mesh=mesh, micro_batches=parts, frozen_loss=loss,
        )  # fmt: skip
        state, metrics = jax.jit(step)(state, rows, weights)
        found.append((float(metrics["grad_norm"]), np.asarray(metrics["image_loss"])))
    (norm, losses), (other_norm, other_losses) = found
    assert other_norm == pytest.approx(norm, rel=1e-3)
    assert relative_l2(other_losses, losses) < 1e-4


# ------------------------------------------------------------------ whole runs
STEPS = 8


def student(runs, name, *flags, process="", **options):
    """train_main.py on a student of the tiny teacher, on four devices in all."""
    options = {"devices": 4, "name": process} | options
    mesh = [f"--config.mesh.{axis}=2" for axis in ("data", "fsdp")]
    steps = [f"--config.train.steps={STEPS}", "--config.train.checkpoint_every=2"]
    config = f"tests/support/tiny_student.py:{runs / 'teacher'}"
    return Command(None, runs / name, *mesh, *steps, *flags, config=config, **options)


def teacher_config(folder):
    config = tiny_config(folder, steps=1, mask_ratio=0.0)
    config.model.options.update(depth=1, patch_mixer_depth=1)
    config.eval.evaluators = ()
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a tiny teacher, and a student of it that was left in peace."""
    folder = tmp_path_factory.mktemp("students")
    train(teacher_config(folder), folder / "teacher")
    command = student(folder, "whole", "--config.eval.num_samples=2")
    assert command.finish() == 0, command.text()
    return folder


def test_a_student_is_recorded_and_sampled(runs):
    about = read_run_metadata(runs / "whole")
    assert about["student"]["guidance_scale"] == 3.0
    assert about["student"]["teacher"] == str(runs / "teacher")
    assert about["config"]["model"]["options"]["dim"] == 16
    assert (runs / "whole" / "samples" / f"step_{STEPS:07d}.png").exists()
    pipe, model = load(str(runs / "whole"))
    assert model.student is not None and pipe.student == model.student
    assert pipe.generate("dog", seed=1).shape == (1, 32, 32, 3)
    start, _ = load(str(runs / "teacher"))
    assert start.student is None and not np.array_equal(
        jax.tree.leaves(start.params)[0], jax.tree.leaves(pipe.params)[0]
    )


def test_a_student_that_was_killed_resumes_to_the_bit(runs):
    command = student(runs, "killed")
    command.wait_for_step(5)
    command.process.send_signal(signal.SIGKILL)
    assert command.finish() == -signal.SIGKILL
    assert last_step(runs / "killed") < STEPS
    command = student(runs, "killed")
    assert command.finish() == 0, command.text()
    assert "resumed" in command.text()
    found, expected = (state_of(runs / name, STEPS) for name in ("killed", "whole"))
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        assert leaf.tobytes() == expected[path].tobytes(), path
    assert [line["loss"] for line in lines(runs / "killed")] == losses_of(runs / "whole")


def losses_of(workdir):
    return [line["loss"] for line in lines(workdir) if "loss" in line]


@pytest.mark.slow
def test_a_student_on_two_processes_is_that_on_one(runs):
    join = [f"--coordinator_address=localhost:{free_port()}", "--num_processes=2"]
    commands = [
        student(
            runs, "two", *join, f"--process_id={number}", process=f"_{number}", devices=2,
            JAX_ENABLE_COMPILATION_CACHE="false",
        )
        for number in range(2)
    ]  # fmt: skip
    for command in commands:
        assert command.finish() == 0, command.text()
    np.testing.assert_allclose(losses_of(runs / "two"), losses_of(runs / "whole"), rtol=1e-5)
    found, expected = (state_of(runs / name, STEPS) for name in ("two", "whole"))
    for words in ("params/", "ema/", "/mu/", "/nu/"):
        one, other = (
            np.concatenate([leaf.ravel() for path, leaf in sorted(s.items()) if words in path])
            for s in (found, expected)
        )
        assert relative_l2(one, other) < 1e-5, words


def test_another_teacher_is_refused(runs):
    with pytest.raises(UserError, match="a few-step student, .* give its own teacher"):
        train(get_config(str(runs / "whole")), runs / "of_a_student")
    config = teacher_config(runs)
    config.ema.snapshot_every = 0  # as the student's: else its checkpoint has other arrays
    with pytest.raises(UserError, match="was begun with another teacher, or none, found none"):
        train(config, runs / "whole")


@pytest.mark.parametrize(
    "part, changes, message",
    [
        ("train", {"mask_ratio": 0.5}, "train.mask_ratio must be 0 with a teacher"),
        ("eval", {"evaluators": ("heldout_loss",)}, "must not have heldout_loss with a teacher"),
        ("distill", {"guidance_interval": (2.0, 1.0)}, "two noise levels 0 <= low < high"),
        ("model", {"arch": "MicroDiT_Tiny_2"}, "found another; give --config.model.arch=teacher"),
    ],
)
def test_what_a_student_cannot_learn_with(runs, part, changes, message):
    config = get_config(str(runs / "teacher"))
    config[part].update(changes)
    if part == "model":
        config.model.options.update(input_size=8, in_channels=8, caption_channels=256)
    with pytest.raises(UserError, match=message):
        train(config, runs / "refused")
