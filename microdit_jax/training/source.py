"""Takes over from a network what a run that goes on with its weights leaves open; adapters."""

import copy
import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray
from ml_collections import ConfigDict

from microdit_jax import sharding
from microdit_jax.assets import load
from microdit_jax.checkpoints.weights import weights_digest
from microdit_jax.data.stores import open_store
from microdit_jax.diffusion import EdmConfig
from microdit_jax.errors import UserError, visible
from microdit_jax.machine import hosts
from microdit_jax.models.dit import DiT, DiTConfig, abstract_params, cast_matrices
from microdit_jax.models.lora import Adapted, Lora, merged
from microdit_jax.training.loss import Batch, batch_loss
from microdit_jax.training.step import TrainState
from microdit_jax.trees import flatten

ARCH = "source"  # config.model.arch of a run that has the sizes of what init_weights_from names
# Noise levels of the recipe's 512 px stages, from which the released checkpoints come.
RELEASED_NOISE = {"P_mean": 0.0, "P_std": 0.6}


class Frozen(NamedTuple):
    """Weights that a run adapts and does not change.

    Attributes:
      params: matrices in the type that the network multiplies them in.
      record: what is recorded of them beside the adapters.
      description: tells a person what was loaded.
    """

    params: Any
    record: Adapted
    description: str


def adapters(config: ConfigDict) -> Lora | None:
    """Returns the adapters that a config asks for, None if it trains the weights themselves."""
    settings = config.lora
    if not settings.rank:
        return None
    return Lora(settings.rank, float(settings.alpha), tuple(settings.targets))


@dataclasses.dataclass(frozen=True)
class LoraLoss:
    """The loss of adapters of frozen weights, called like `training.distill.StudentLoss`."""

    lora: Lora
    edm: EdmConfig
    mask_ratio: float

    def __call__(
        self, model: DiT, params: Any, frozen: Any, batch: Batch, key: PRNGKeyArray
    ) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """Returns `loss.batch_loss` of the network with the adapters merged."""
        whole = self.lora.merge(frozen, params)
        return batch_loss(model, whole, batch, key, edm=self.edm, mask_ratio=self.mask_ratio)


def abstract_adapters(
    lora: Lora, weights: Any, optimizer: optax.GradientTransformation, mesh: Any, *, with_ema: bool
) -> TrainState:
    """Shapes, types and shardings of the state of new adapters.

    Args:
      weights: the frozen weights, or their shapes.
      mesh: a Mesh or an AbstractMesh.
    """

    def create() -> TrainState:
        return new_adapters(lora, weights, optimizer, jax.random.key(0), with_ema=with_ema)

    return sharding.with_shardings(jax.eval_shape(create), mesh)


def new_adapters(
    lora: Lora,
    weights: Any,
    optimizer: optax.GradientTransformation,
    key: PRNGKeyArray,
    *,
    with_ema: bool,
) -> TrainState:
    """Returns the state of new adapters; `weights` are the frozen ones, or their shapes."""
    return TrainState.create(lora.init(weights, key), optimizer, with_ema=with_ema)


def lora_loss(config: ConfigDict) -> LoraLoss | None:
    """Returns the loss of a run of adapters; None for one that trains the weights themselves."""
    lora = adapters(config)
    if lora is None:
        return None
    return LoraLoss(lora, EdmConfig(**config.edm), config.train.mask_ratio)


def load_frozen(config: ConfigDict, cfg: DiTConfig, mesh: Mesh) -> Frozen | None:
    """Loads the weights that a run's adapters adapt; None if it has none.

    Raises:
      UserError: nothing usable there, or another network.
    """
    lora = adapters(config)
    if lora is None:
        return None
    model = load.load_model(config.init_weights_from, mesh=mesh)
    check_shapes(model.params, abstract_params(cfg), model.description, arch=ARCH)
    record = Adapted(base=config.init_weights_from, weights=weights_digest(model.params), lora=lora)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, model.params)
    cast = jax.jit(functools.partial(cast_matrices, config=cfg), out_shardings=shardings)
    return Frozen(cast(model.params), record, model.description)


def with_whole_weights(state: TrainState, *, frozen: Frozen | None) -> TrainState:
    """Returns the state with the adapters merged into the weights, to evaluate; or as it is."""
    if frozen is None:
        return state
    merge = functools.partial(merged, frozen.record.lora, frozen.params)
    average = None if state.ema is None else merge(state.ema)
    return state.replace(params=merge(state.params), ema=average)


_OTHER = {  # by the key in a checkpoint: what a run was begun with, and the fix
    "teacher": ("another teacher, or none", "give the same one"),
    "adapted": (
        "adapters of other weights, or without",
        "give the same config.init_weights_from and config.lora",
    ),
}


def check_same(
    workdir: str | Path, saved: dict[str, Any], key: str, weights: str | None, name: str | None
) -> None:
    """Checks that a run that resumes has the frozen weights that it was begun with.

    Args:
      saved: what a checkpoint holds beside the state.
      key: "teacher" or "adapted", under which it has the sha256 of those weights.
      weights, name: of the frozen weights that the run has now; None for none.
    Raises:
      UserError: they are others.
    """
    if saved.get(key) != weights:
        begun, fix = _OTHER[key]
        found = "none" if name is None else visible(name)
        raise UserError(
            f"{visible(workdir)} was begun with {begun}, found {found}; {fix}, or another workdir"
        )


def filled_in(config: ConfigDict) -> ConfigDict:
    """Returns the config with what is its source's filled in, where it leaves that open.

    These are the network's sizes, its noise levels, the names of its towers, and of data.folder
    the resolution. Nothing changes for other configs than those with model.arch=source.

    Raises:
      UserError: no source, or a few-step student; no folder of latents.
    """
    if config.model.arch != ARCH:
        return config
    config = copy.deepcopy(config)
    if not config.init_weights_from:
        raise UserError(
            "model.arch=source takes its sizes from config.init_weights_from, found none; give a "
            "run, a checkpoint or a model's name, such as --config.init_weights_from=instant"
        )
    model = load.load_model(config.init_weights_from, with_params=False)
    if model.student is not None:
        raise UserError(
            f"expected a network that takes many steps, found a few-step student, "
            f"{visible(model.description)}; give its own teacher, {visible(model.student.teacher)}"
        )
    # Of the options, those that the config leaves empty are the source's.
    given = [name for name, value in config.model.options.items() if value != ""]
    take_sizes(config, model.config, kept=given)
    noise = {name: getattr(model.edm, name) for name in config.edm}
    config.edm.update(noise if model.folder is not None else noise | RELEASED_NOISE)
    data = config.data
    data.vae, data.text_encoder = data.vae or model.vae, data.text_encoder or model.text_encoder
    if data.folder:
        _fit_to_folder(config)
    return config


def take_sizes(config: ConfigDict, sizes: DiTConfig, *, kept: Iterable[str]) -> None:
    """Sets the network's sizes; the options in `kept` stay as the config has them."""
    chosen = {name: config.model.options[name] for name in kept}
    config.model.arch = "DiT"
    with config.model.options.unlocked():
        config.model.options.update(dataclasses.asdict(sizes) | chosen)


def _fit_to_folder(config: ConfigDict) -> None:
    """Sets the resolution, where the folder has another, and the size of its latents."""
    data = config.data

    def sizes() -> dict[str, int]:
        _, info = open_store(data.folder, cache=data.cache or None)
        return {} if info is None else {str(p): shape[1] for p, shape in info.latents.items()}

    found = hosts.from_first("look at the folder of latents", sizes)
    if not found:  # the reference's, which says nothing
        return
    if str(data.resolution) not in found:
        data.resolution = max(map(int, found))
    config.model.options.input_size = found[str(data.resolution)]


def check_shapes(params: Any, abstract_params: Any, description: str, *, arch: str) -> None:
    """Raises UserError if a run's network, given by its shapes, is not that of these weights."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        return {path: leaf.shape for path, leaf in flatten(tree).items()}

    if shapes(params) != shapes(abstract_params):
        raise UserError(
            f"expected the network of {visible(description)}, found another; give "
            f"--config.model.arch={arch}, which takes its sizes"
        )
