"""Students: the consistency loss against its definition, and a whole run of one."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_l2, tiny_model
from test_train import tiny_config

from configs import distill as distill_config
from microdit_jax import diffusion, sharding
from microdit_jax.checkpoints.run import read_run_metadata
from microdit_jax.create import load
from microdit_jax.diffusion import EdmConfig
from microdit_jax.errors import UserError
from microdit_jax.models import derivatives, dit, matmuls
from microdit_jax.models.dit import DiT
from microdit_jax.train import train
from microdit_jax.training import distill, optim
from microdit_jax.training import step as train_step
from microdit_jax.training.loss import sample_randomness

EDM = EdmConfig(P_mean=-0.2, P_std=1.6)
RNG = np.random.default_rng(0)
Y = jnp.asarray(RNG.normal(size=(4, 5, 24)), jnp.float32)
LATENTS = jnp.asarray(RNG.normal(size=(4, 8, 8, 4)), jnp.float32)
BATCH = {"latents": LATENTS, "caption_latents": Y, "position": jnp.arange(4)}
KEY = jax.random.key(3)


@functools.cache
def networks():
    """A student's network, and weights of it and of a teacher; none are zero."""
    model = tiny_model()
    model = DiT(dataclasses.replace(model.config, depth=1))
    shapes = dit.abstract_params(model.config)
    normals = np.random.default_rng(1)
    return model, *(
        jax.tree.map(
            lambda leaf: jnp.asarray(normals.normal(0, 0.1, leaf.shape), leaf.dtype), shapes
        )
        for _ in range(2)
    )


def loss_of(**changes):
    model, *_ = networks()
    plain = DiT(dataclasses.replace(model.config, attention="xla"))
    settings = {
        "teacher": plain, "edm": EDM, "guidance_scale": 3.0, "guidance_interval": (0.1, 1.0),
        "warmup_steps": 10,
    }  # fmt: skip
    return distill.StudentLoss(**settings | changes)


@functools.partial(jax.jit, static_argnums=0)
def value_and_grad(loss, params, teacher, batch, step):
    """((mean, (losses, sigma)), gradient): one program for all tests of a loss."""

    def mean(params):
        losses, sigma = loss(networks()[0], params, teacher, batch, KEY, step)
        return losses.mean(), (losses, sigma)

    return jax.value_and_grad(mean, has_aux=True)(params)


def value(loss, params, teacher, batch, step):
    return value_and_grad(loss, params, teacher, batch, jnp.int32(step))[0][1]


def test_matmuls_of_forward_mode_are_the_same():
    x, w = jnp.asarray(RNG.normal(size=(2, 3, 4))), jnp.asarray(RNG.normal(size=(4, 5)))
    with derivatives.forward_mode():
        plain = matmuls.matmul(x, w)
        out, tangent = jax.jvp(lambda x: matmuls.matmul(x, w), (x,), (x,))
    np.testing.assert_array_equal(plain, matmuls.matmul(x, w))
    np.testing.assert_allclose(tangent, out, rtol=1e-6)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: matmuls.matmul(x, w), (x,), (x,))


def student_f(params, teacher, t, y):
    """f of sCM in float64 at a point of the teacher's trajectory through x_t, by finite steps."""
    model, *_ = networks()

    apply = jax.jit(model.apply)

    def F(params, x, t, y=y):
        c_noise = jnp.asarray(np.log(EDM.sigma_data * np.tan(t)) / 4, jnp.float32)
        out = apply({"params": params}, jnp.asarray(x / EDM.sigma_data, jnp.float32),
                          c_noise, y)[0]  # fmt: skip
        return np.asarray(out, np.float64)

    def f(x, t):
        wide = t[:, None, None, None]
        return np.cos(wide) * x + np.sin(wide) * EDM.sigma_data * F(params, x, t)

    return F, f


def test_the_target_is_the_derivative_along_the_teachers_trajectory():
    """sCM's tangent, -cos(t) / sigma_data df/dt, by finite differences of f along dx/dt."""
    model, params, teacher = networks()
    random = sample_randomness(KEY, BATCH["position"], model.config)
    sigma = np.asarray(diffusion.training_sigma(random.sigma_normal, EDM), np.float64)
    t = np.arctan(sigma / EDM.sigma_data)
    wide = t[:, None, None, None]
    noise = np.asarray(random.noise, np.float64) * EDM.sigma_data
    x = np.cos(wide) * np.asarray(LATENTS, np.float64) + np.sin(wide) * noise

    F, f = student_f(params, teacher, t, Y)
    F_cond = F(teacher, x, t)
    F_uncond = F(teacher, x, t, 0 * Y)
    acts = (0.1 < sigma) & (sigma <= 1.0)
    assert 0 < acts.sum() < 4
    F_teacher = F_uncond + np.where(acts, 3.0, 1.0)[:, None, None, None] * (F_cond - F_uncond)
    h = 2e-3
    ahead, behind = (f(x - s * h * EDM.sigma_data * F_teacher, t + s * h) for s in (1, -1))
    tangent = -np.cos(wide) / EDM.sigma_data * (ahead - behind) / (2 * h)
    size = np.sqrt(np.square(tangent).mean(axis=(1, 2, 3), keepdims=True))
    expected = np.square(tangent / (size + 0.1)).mean(axis=(1, 2, 3))
    (_, (found, found_sigma)), grads = value_and_grad(
        loss_of(), params, teacher, BATCH, jnp.int32(10)
    )
    np.testing.assert_allclose(found_sigma, sigma, rtol=1e-6)
    np.testing.assert_allclose(found, expected, rtol=0.02)

    # The gradient is that of F, along the tangent: -2 tangent dF / d params.
    def along(params):
        F_student = model.apply(
            {"params": params}, jnp.asarray(x / EDM.sigma_data, jnp.float32),
            jnp.asarray(np.log(sigma) / 4, jnp.float32), Y,
        )[0]  # fmt: skip
        normalised = jnp.asarray(tangent / (size + 0.1), jnp.float32)
        return -2 * jnp.mean(normalised * F_student)

    by_hand = jax.jit(jax.grad(along))(params)
    flat = [np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(g)]) for g in (grads, by_hand)]
    assert relative_l2(*flat) < 0.03


def test_before_the_warm_up_a_student_learns_guidance():
    """Without the derivative the tangent leads to the guided teacher's F: 0 where it is its own."""
    _, _, teacher = networks()
    losses, sigma = value(loss_of(), teacher, teacher, BATCH, 0)
    guided = (0.1 < sigma) & (sigma <= 1.0)
    assert losses[~guided].max() < 1e-8 and losses[guided].min() > 1e-4
    later, _ = value(loss_of(), teacher, teacher, BATCH, 5)
    assert later.min() > 1e-4


def test_captions_alone_are_enough():
    """Data-free: the images of the batch are not looked at, the teacher's own are made."""
    _, params, teacher = networks()
    loss = loss_of(trajectory_steps=4)
    first, _ = value(loss, params, teacher, BATCH, 10)
    other, _ = value(loss, params, teacher, BATCH | {"latents": 0 * LATENTS}, 10)
    np.testing.assert_array_equal(first, other)
    with_data, _ = value(loss_of(), params, teacher, BATCH, 10)
    assert relative_l2(first, with_data) > 1e-3


def test_micro_batches_and_meshes_change_nothing():
    model, params, teacher = networks()
    schedule = optim.learning_rate(1e-3)
    optimizer = optim.adamw(schedule)
    found = []
    batch = {key: np.concatenate([np.asarray(value)] * 2) for key, value in BATCH.items()}
    del batch["position"]
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
            ema_start_step=0, mesh=mesh, micro_batches=parts, student=loss_of(),
        )  # fmt: skip
        state, metrics = jax.jit(step)(state, rows, weights)
        found.append((float(metrics["grad_norm"]), np.asarray(metrics["image_loss"])))
    (norm, losses), (other_norm, other_losses) = found
    assert other_norm == pytest.approx(norm, rel=1e-3)
    assert relative_l2(other_losses, losses) < 1e-4


# ------------------------------------------------------------------ whole runs
def student_config(teacher, **changes):
    config = distill_config.get_config()
    config.teacher = str(teacher)
    config.train.update(steps=4, batch_size=8, log_every=1, checkpoint_every=2, eval_every=100)
    config.distill.warmup_steps = 2
    config.eval.update(num_samples=2, num_inference_steps=2)
    config.optim.update(decay_steps=10, warmup_steps=1)
    config.log.tensorboard = False
    config.train.update(changes)
    return config


def teacher_config(folder):
    config = tiny_config(folder, steps=1, mask_ratio=0.0)
    config.model.options.update(depth=1)
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A tiny teacher, and a student of it, each in a few steps."""
    folder = tmp_path_factory.mktemp("students")
    train(teacher_config(folder), folder / "teacher")
    return folder, train(student_config(folder / "teacher"), folder / "whole")


def test_a_student_is_recorded_and_sampled(runs):
    folder, state = runs
    about = read_run_metadata(folder / "whole")
    assert about["student"]["guidance_scale"] == 3.0
    assert about["student"]["teacher"] == str(folder / "teacher")
    assert about["config"]["model"]["options"]["dim"] == 16
    assert (folder / "whole" / "samples" / "step_0000004.png").exists()
    pipe, model = load(str(folder / "whole"))
    assert model.student is not None and pipe.student == model.student
    assert pipe.generate("dog", seed=1).shape == (1, 32, 32, 3)
    start, _ = load(str(folder / "teacher"))
    assert start.student is None and not np.array_equal(
        jax.tree.leaves(start.params)[0], jax.tree.leaves(state.params)[0]
    )


def test_a_student_resumes_to_the_bit(runs):
    folder, state = runs
    shutil.copytree(folder / "whole", folder / "resumed")
    shutil.rmtree(folder / "resumed" / "checkpoints" / "4")
    again = train(student_config(folder / "teacher"), folder / "resumed")
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_another_teacher_is_refused(runs):
    folder, _ = runs
    with pytest.raises(UserError, match="a few-step student, .* give its own teacher"):
        train(student_config(folder / "whole"), folder / "of_a_student")
    with pytest.raises(UserError, match="was begun with another teacher, or none, found none"):
        train(teacher_config(folder), folder / "whole")


@pytest.mark.parametrize(
    "part, changes, message",
    [
        ("train", {"mask_ratio": 0.5}, "train.mask_ratio must be 0 with a teacher"),
        ("eval", {"evaluators": ("heldout_loss",)}, "must not have heldout_loss with a teacher"),
        ("distill", {"guidance_interval": (2.0, 1.0)}, "two noise levels 0 <= low < high"),
        ("model", {"arch": "MicroDiT_Tiny_2"}, "a student has its teacher's network"),
    ],
)
def test_what_a_student_cannot_learn_with(runs, part, changes, message):
    folder, _ = runs
    config = student_config(folder / "teacher")
    config[part].update(changes)
    if part == "model":
        config.model.options.update(input_size=8, in_channels=8, caption_channels=256)
    with pytest.raises(UserError, match=message):
        train(config, folder / "refused")
