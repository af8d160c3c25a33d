"""Workloads that the benchmark can time: compiled programs on random weights and data."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from microdit_jax import diffusion, sharding
from microdit_jax.errors import UserError
from microdit_jax.machine import compilation_cache, memory
from microdit_jax.models import attention, dit, flops, moe
from microdit_jax.models.dit import DiT, DiTConfig
from microdit_jax.models.layers import small_normal
from microdit_jax.sampling import guidance, solvers
from microdit_jax.sampling import programs as sampler
from microdit_jax.training import optim
from microdit_jax.training import step as train_step

CAPTION_LENGTH = 77
# Attention implementations that run on each platform.
ATTENTION = {"cpu": ("xla", "looped"), "gpu": ("xla", "cudnn"), "tpu": ("xla", "splash")}
NAMES = ("train_step", "forward", "sampler", "moe", "attention")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to compute a workload; the benchmark runs a grid of them.

    Attributes:
      micro_batches: number of parts that the batch of a training step is computed in.
      expert: number of devices that share the experts.
    """

    attention: str = "xla"
    moe_dispatch: str = "gather"
    remat: str = "none"
    dtype: str = "float32"
    micro_batches: int = 1
    expert: int = 1

    def apply(self, config: DiTConfig) -> DiTConfig:
        """Returns the network's configuration, computed in this way."""
        return dataclasses.replace(
            config,
            attention=self.attention,
            moe_dispatch=self.moe_dispatch,
            remat=self.remat,
            dtype=self.dtype,
        )


# Fields of a variant that change each workload.
MATTERS = {
    "train_step": tuple(field.name for field in dataclasses.fields(Variant)),
    "forward": ("attention", "moe_dispatch", "dtype", "expert"),
    "sampler": ("attention", "moe_dispatch", "dtype", "expert"),
    "moe": ("moe_dispatch", "dtype"),
    "attention": ("attention", "dtype"),
}


class Size(NamedTuple):
    """Amount of work: `batch` images of a step, `images` of the forward pass and the sampler."""

    batch: int = 8
    images: int = 4
    mask_ratio: float = 0.75
    sampler_steps: int = 4


class Workload(NamedTuple):
    """A compiled program.

    Attributes:
      run: runs it once and returns when it is done.
      operations: operations of one run, counted from the network's sizes.
    """

    run: Callable[[], Any]
    operations: int
    compiled: jax.stages.Compiled
    compile_seconds: float


def grid(what: str, choices: dict[str, tuple]) -> Iterator[Variant]:
    """Yields all variants that differ in a field which changes the workload.

    Args:
      choices: field of Variant -> its values.
    Raises:
      UserError: an attention that this platform does not run, or float32 for cuDNN.
    """
    usable = ATTENTION[jax.default_backend()]
    if unusable := sorted(set(choices["attention"]) - set(usable)):
        raise UserError(
            f"--attention takes {', '.join(usable)} on this {jax.default_backend()}, found "
            f"{', '.join(unusable)}; leave it out or compile for another machine with "
            "microdit_jax.xla.aot"
        )
    names = MATTERS[what]
    for values in itertools.product(*(choices[name] for name in names)):
        variant = Variant(**dict(zip(names, values, strict=True)))
        if variant.attention == "cudnn" and variant.dtype == "float32":
            raise UserError("--attention=cudnn takes bfloat16, found float32; add --dtype=bfloat16")
        yield variant


def random_tree(shapes: Any, shardings: Any = None) -> Any:
    """Fills a tree of shapes: matrices normal with deviation 0.02, vectors ones, integers zeros.

    Args:
      shardings: a sharding for each array, or None for the default device.
    """
    rng = np.random.default_rng(0)

    def fill(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return np.zeros(leaf.shape, leaf.dtype)
        if len(leaf.shape) < 2:
            return np.ones(leaf.shape, leaf.dtype)
        return (0.02 * rng.standard_normal(leaf.shape, np.float32)).astype(leaf.dtype)

    if shardings is None:
        return jax.tree.map(lambda leaf: jnp.asarray(fill(leaf)), shapes)
    return jax.tree.map(lambda leaf, to: jax.device_put(fill(leaf), to), shapes, shardings)


def inputs(config: DiTConfig, n: int) -> dict[str, np.ndarray]:
    """Returns random x (n, h, w, channels), noise levels t (n,), captions y (n, l, caption)."""
    side = config.input_size
    memory.check_host(
        4 * n * (config.in_channels * side**2 + CAPTION_LENGTH * config.caption_channels),
        what=f"a batch of {n} images",
        fix="time a smaller one",
    )
    rng = np.random.default_rng(1)
    shapes = {
        "x": (n, side, side, config.in_channels),
        "t": (n,),
        "y": (n, CAPTION_LENGTH, config.caption_channels),
    }
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def _compile(function: Callable, *args, **kwargs) -> tuple[jax.stages.Compiled, float]:
    """Compiles a function without the compilation cache; returns the seconds that took."""
    with compilation_cache.unused():
        lowered = function.lower(*args, **kwargs)
        start = time.perf_counter()
        return lowered.compile(), time.perf_counter() - start


def _mesh(variant: Variant) -> jax.sharding.Mesh | None:
    if jax.device_count() == 1 and variant.expert == 1:
        return None
    return sharding.make_mesh(data=-1, expert=variant.expert)


def train_step_workload(config: DiTConfig, size: Size, variant: Variant) -> Workload:
    """Compiles one training step with AdamW, its state donated; no moving average."""
    model, mesh = DiT(variant.apply(config)), _mesh(variant)
    optimizer = optim.adamw(optim.learning_rate(2.4e-4))
    init = jax.eval_shape(
        lambda key: train_step.init_state(model, optimizer, key, with_ema=False), jax.random.key(0)
    )
    shardings = None if mesh is None else sharding.shardings(init, mesh)
    data = inputs(config, size.batch)
    batch = {"latents": data["x"], "caption_latents": data["y"]}
    if mesh is not None:
        batch = sharding.put_batch(batch, mesh)
    step = train_step.make_train_step(
        model,
        optimizer,
        optim.learning_rate(2.4e-4),
        edm=diffusion.EdmConfig(),
        mask_ratio=size.mask_ratio,
        seed=0,
        ema_smoothing=0.0,
        ema_start_step=0,
        mesh=mesh,
        micro_batches=variant.micro_batches,
    )
    params = random_tree(init.params, None if shardings is None else shardings.params)
    # Zeros, also as moments, of which the second is not negative.
    zeros = jax.jit(
        lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), init),
        out_shardings=shardings,
    )
    state = zeros().replace(params=params)
    compiled, seconds = _compile(jax.jit(step, donate_argnums=0), state, batch)
    held = [state]  # the only reference, since a donated state cannot be used again
    del state, params

    def run():
        held[0], metrics = compiled(held[0], batch)
        jax.block_until_ready(held[0])
        return metrics

    operations = flops.train_flops(model.config, size.mask_ratio, CAPTION_LENGTH) * size.batch
    return Workload(run, operations, compiled, seconds)


def forward_workload(config: DiTConfig, size: Size, variant: Variant) -> Workload:
    """Compiles one evaluation of the network without masking, its captions included."""
    model = DiT(variant.apply(config))
    params = random_tree(dit.abstract_params(config))
    data = jax.tree.map(jnp.asarray, inputs(config, size.images))

    def forward(params, x, t, y):
        return model.apply({"params": params}, x, t, y)[0]

    args = (params, data["x"], data["t"], data["y"])
    compiled, seconds = _compile(jax.jit(forward), *args)
    operations = flops.forward_flops(model.config, 0.0, CAPTION_LENGTH) * size.images
    return Workload(lambda: jax.block_until_ready(compiled(*args)), operations, compiled, seconds)


def sampler_workload(config: DiTConfig, size: Size, variant: Variant) -> Workload:
    """Compiles sampling with guidance, captions to latents, by the programs `generate` runs."""
    model, mesh = DiT(variant.apply(config)), _mesh(variant)
    shapes = dit.abstract_params(config)
    params = random_tree(shapes, None if mesh is None else sharding.shardings(shapes, mesh))
    data, edm = inputs(config, size.images), diffusion.EdmConfig()
    static = {"model": model, "mesh": mesh}
    texts = guidance.interleave(jnp.asarray(data["y"]), jnp.zeros_like(data["y"]))
    encode, encode_seconds = _compile(sampler.encode_captions, params, texts, **static)
    caption = encode(params, texts)
    rows = solvers.heun_evaluations(size.sampler_steps, edm)
    strength = guidance.Strength(guidance.REFERENCE_SCALE).as_float32()
    state = sampler.start(data["x"], edm=edm)
    evaluate, seconds = _compile(
        sampler.evaluate_network, params, caption, state, rows[0], strength,
        sigma_data=edm.sigma_data, form=guidance.Form.GUIDED, **static,
    )  # fmt: skip

    def run():
        caption, state = encode(params, texts), sampler.start(data["x"], edm=edm)
        for row in rows:
            state = evaluate(params, caption, state, row, strength)
        return jax.block_until_ready(state.solver.x)

    text = flops.caption_flops(model.config, CAPTION_LENGTH)
    image = flops.forward_flops(model.config, 0.0, CAPTION_LENGTH) - text
    operations = 2 * size.images * (image * len(rows) + text)
    return Workload(run, operations, evaluate, seconds + encode_seconds)


def moe_workload(config: DiTConfig, size: Size, variant: Variant) -> Workload:
    """Compiles the forward and backward pass of the mixer's expert layer."""
    cfg = variant.apply(config)
    d, t = cfg.patch_mixer_dim, cfg.num_tokens
    layer = moe.ExpertChoiceFeedForward(
        num_experts=cfg.num_experts,
        capacity=cfg.expert_capacity,
        hidden=cfg.expert_width(d, cfg.patch_mixer_mlp_ratio),
        init_std=0.02,
        out_init=small_normal(0.02),
        dispatch=cfg.moe_dispatch,
        precision=cfg.precision,
    )
    x = jax.random.normal(jax.random.key(0), (size.batch, t, d), jnp.float32)
    params = random_tree(jax.eval_shape(layer.init, jax.random.key(0), x)["params"])
    operations = 3 * size.batch * flops.expert_flops(cfg, t, d, cfg.patch_mixer_mlp_ratio)
    return _gradient_workload(lambda p, x: layer.apply({"params": p}, x), operations, params, x)


def attention_workload(config: DiTConfig, size: Size, variant: Variant) -> Workload:
    """Compiles the forward and backward pass of the mixer's self-attention, no projections."""
    t, d, c = config.num_tokens, config.patch_mixer_dim, config.head_dim
    shape, keys = (size.batch, t, d // c, c), jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, shape, variant.dtype) for key in keys)
    operations = 3 * size.batch * flops.attention_flops(t, t, d)
    return _gradient_workload(attention.IMPLEMENTATIONS[variant.attention], operations, q, k, v)


def _gradient_workload(function: Callable, operations: int, *args) -> Workload:
    def loss(*args):
        out = function(*args).astype(jnp.float32)
        return jnp.square(out).sum()

    gradient = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(args)))))
    compiled, seconds = _compile(gradient, *args)
    return Workload(lambda: jax.block_until_ready(compiled(*args)), operations, compiled, seconds)


COMPILE = {
    "train_step": train_step_workload,
    "forward": forward_workload,
    "sampler": sampler_workload,
    "moe": moe_workload,
    "attention": attention_workload,
}
