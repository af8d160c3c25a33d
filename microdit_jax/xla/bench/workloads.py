"""What the benchmark can time, each as one compiled program on random weights and data."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from microdit_jax import diffusion, sharding
from microdit_jax.errors import UserError
from microdit_jax.models import attention, dit, flops, moe
from microdit_jax.models.dit import DiT, DiTConfig
from microdit_jax.sampling import programs as sampler
from microdit_jax.training import optim
from microdit_jax.training import step as train_step

CAPTION_LENGTH = 77
# Kernels that can run on each platform.
KERNELS = {"cpu": ("xla", "looped"), "gpu": ("xla", "cudnn"), "tpu": ("xla", "splash")}
WORKS = ("train_step", "forward", "sampler", "moe", "attention")


@dataclasses.dataclass(frozen=True)
class Variant:
    """How one program is computed; the benchmark runs the grid of all.

    micro_batches: parts of a training step's batch. expert: devices that share the experts.
    """

    attention: str = "xla"
    moe_dispatch: str = "gather"
    remat: str = "none"
    dtype: str = "float32"
    micro_batches: int = 1
    expert: int = 1

    def apply(self, config: DiTConfig) -> DiTConfig:
        """The network computed in this way."""
        return dataclasses.replace(
            config,
            attention=self.attention,
            moe_dispatch=self.moe_dispatch,
            remat=self.remat,
            dtype=self.dtype,
        )


# What of a variant makes a difference to each piece of work.
MATTERS = {
    "train_step": tuple(field.name for field in dataclasses.fields(Variant)),
    "forward": ("attention", "moe_dispatch", "dtype", "expert"),
    "sampler": ("attention", "moe_dispatch", "dtype", "expert"),
    "moe": ("moe_dispatch", "dtype"),
    "attention": ("attention", "dtype"),
}


class Size(NamedTuple):
    """How much work: images of a step, of one evaluation and of the sampler, and its steps."""

    batch: int = 8
    images: int = 4
    mask_ratio: float = 0.75
    sampler_steps: int = 4


class Work(NamedTuple):
    """A compiled program. run returns when it is done; operations are analytic, for one run."""

    run: Callable[[], Any]
    operations: int
    compiled: jax.stages.Compiled
    compile_seconds: float


def grid(what: str, choices: dict[str, tuple]) -> Iterator[Variant]:
    """All variants that differ in what matters to a piece of work.

    Args:
      choices: field of Variant -> its values.
    Raises:
      UserError: a kernel that this platform does not run, or 32-bit types for cuDNN.
    """
    usable = KERNELS[jax.default_backend()]
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


def random_tree(shapes: Any, places: Any = None) -> Any:
    """Arrays for a tree of shapes: matrices normal with deviation 0.02, vectors ones."""
    rng = np.random.default_rng(0)

    def fill(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return np.zeros(leaf.shape, leaf.dtype)
        if len(leaf.shape) < 2:
            return np.ones(leaf.shape, leaf.dtype)
        return (0.02 * rng.standard_normal(leaf.shape, np.float32)).astype(leaf.dtype)

    if places is None:
        return jax.tree.map(lambda leaf: jnp.asarray(fill(leaf)), shapes)
    return jax.tree.map(lambda leaf, place: jax.device_put(fill(leaf), place), shapes, places)


def abstract_params(config: DiTConfig) -> Any:
    """Shapes of a network's parameters."""
    model = DiT(config)
    optimizer = optim.adamw(lambda step: 0.0)
    return jax.eval_shape(
        lambda key: train_step.init_state(model, optimizer, key, with_ema=False), jax.random.key(0)
    ).params


def inputs(config: DiTConfig, n: int) -> dict[str, np.ndarray]:
    """Random latents x (n, h, w, channels), noise levels t (n,) and captions y (n, l, caption)."""
    rng = np.random.default_rng(1)
    side = config.input_size
    shapes = {
        "x": (n, side, side, config.in_channels),
        "t": (n,),
        "y": (n, CAPTION_LENGTH, config.caption_channels),
    }
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def _compile(function: Callable, *args, **kwargs) -> tuple[jax.stages.Compiled, float]:
    """From traced function to program, past the compilation cache, and the seconds it took."""
    kept = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # whether to use it is decided once
    try:
        lowered = function.lower(*args, **kwargs)
        start = time.perf_counter()
        return lowered.compile(), time.perf_counter() - start
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)
        compilation_cache.reset_cache()


def _mesh(variant: Variant) -> jax.sharding.Mesh | None:
    if jax.device_count() == 1 and variant.expert == 1:
        return None
    return sharding.make_mesh(data=-1, expert=variant.expert)


def train_work(config: DiTConfig, size: Size, variant: Variant) -> Work:
    """One training step with AdamW, its state donated; no moving average."""
    model, mesh = DiT(variant.apply(config)), _mesh(variant)
    optimizer = optim.adamw(optim.learning_rate(2.4e-4))
    init = jax.eval_shape(
        lambda key: train_step.init_state(model, optimizer, key, with_ema=False), jax.random.key(0)
    )
    places = None if mesh is None else sharding.shardings(init, mesh)
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
    state = random_tree(init, places)
    zeros = jax.tree.map(jnp.zeros_like, state.opt_state)  # squares of gradients are not negative
    state = state.replace(opt_state=zeros)
    compiled, seconds = _compile(jax.jit(step, donate_argnums=0), state, batch)
    held = [state]
    del state, zeros

    def run():
        held[0], metrics = compiled(held[0], batch)
        jax.block_until_ready(held[0])
        return metrics

    operations = flops.train_flops(model.config, size.mask_ratio, CAPTION_LENGTH) * size.batch
    return Work(run, operations, compiled, seconds)


def forward_work(config: DiTConfig, size: Size, variant: Variant) -> Work:
    """One evaluation of the network without masking, captions and all."""
    model = DiT(variant.apply(config))
    params = random_tree(abstract_params(config))
    data = jax.tree.map(jnp.asarray, inputs(config, size.images))

    def forward(params, x, t, y):
        return model.apply({"params": params}, x, t, y)[0]

    args = (params, data["x"], data["t"], data["y"])
    compiled, seconds = _compile(jax.jit(forward), *args)
    operations = flops.forward_flops(model.config, 0.0, CAPTION_LENGTH) * size.images
    return Work(lambda: jax.block_until_ready(compiled(*args)), operations, compiled, seconds)


def sampler_work(config: DiTConfig, size: Size, variant: Variant) -> Work:
    """The sampler with guidance, from captions to latents, by the programs that `generate` runs."""
    model, mesh = DiT(variant.apply(config)), _mesh(variant)
    shapes = abstract_params(config)
    params = random_tree(shapes, None if mesh is None else sharding.shardings(shapes, mesh))
    data, edm = inputs(config, size.images), diffusion.EdmConfig()
    static = {"model": model, "guide": True, "mesh": mesh}
    encode, encode_seconds = _compile(sampler.encode_captions, params, data["y"], **static)
    caption = encode(params, data["y"])
    rows = list(_rows(diffusion.heun_evaluations(size.sampler_steps, edm)))
    start, scale = jax.jit(diffusion.heun_start), np.float32(5.0)
    state = start(data["x"])
    evaluate, seconds = _compile(
        sampler.evaluate_network, params, caption, state, rows[0], scale,
        sigma_data=edm.sigma_data, **static,
    )  # fmt: skip

    def run():
        caption, state = encode(params, data["y"]), start(data["x"])
        for row in rows:
            state = evaluate(params, caption, state, row, scale)
        return jax.block_until_ready(state.x)

    text = flops.caption_flops(model.config, CAPTION_LENGTH)
    image = flops.forward_flops(model.config, 0.0, CAPTION_LENGTH) - text
    operations = 2 * size.images * (image * len(rows) + text)
    return Work(run, operations, evaluate, seconds + encode_seconds)


def _rows(table: dict[str, np.ndarray]) -> Iterator[dict[str, np.generic]]:
    count = len(next(iter(table.values())))
    return ({name: values[i] for name, values in table.items()} for i in range(count))


def moe_work(config: DiTConfig, size: Size, variant: Variant) -> Work:
    """Forward and backward pass of the mixer's expert layer."""
    cfg = variant.apply(config)
    d, t = cfg.patch_mixer_dim, cfg.num_tokens
    hidden = dit.round_up(int(d * cfg.patch_mixer_mlp_ratio), cfg.multiple_of)
    layer = moe.ExpertChoiceFeedForward(
        cfg.num_experts, cfg.expert_capacity, hidden, 0.02, dit.small_normal(0.02),
        cfg.moe_dispatch, dtype=cfg.dtype,
    )  # fmt: skip
    x = jax.random.normal(jax.random.key(0), (size.batch, t, d), jnp.float32)
    params = random_tree(jax.eval_shape(layer.init, jax.random.key(0), x)["params"])
    operations = 3 * size.batch * flops.expert_flops(cfg, t, d, cfg.patch_mixer_mlp_ratio)
    return _gradient_work(lambda p, x: layer.apply({"params": p}, x), operations, params, x)


def attention_work(config: DiTConfig, size: Size, variant: Variant) -> Work:
    """Forward and backward pass of the mixer's self-attention, without its projections."""
    t, d, c = config.num_tokens, config.patch_mixer_dim, config.head_dim
    shape, keys = (size.batch, t, d // c, c), jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, shape, variant.dtype) for key in keys)
    operations = 3 * size.batch * flops.attention_flops(t, t, d)
    return _gradient_work(
        lambda q, k, v: attention.attend(q, k, v, variant.attention), operations, q, k, v
    )


def _gradient_work(function: Callable, operations: int, *args) -> Work:
    def loss(*args):
        out = function(*args).astype(jnp.float32)
        return jnp.square(out).sum()

    gradient = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(args)))))
    compiled, seconds = _compile(gradient, *args)
    return Work(lambda: jax.block_until_ready(compiled(*args)), operations, compiled, seconds)


MAKERS = {
    "train_step": train_work,
    "forward": forward_work,
    "sampler": sampler_work,
    "moe": moe_work,
    "attention": attention_work,
}
