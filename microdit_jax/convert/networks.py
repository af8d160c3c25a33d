"""Opens what holds a model of ours: a model folder, a training run, or the model in the package."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from microdit_jax.checkpoints.model_folder import Params, is_model, load_model, read_metadata
from microdit_jax.checkpoints.restore import good_step
from microdit_jax.checkpoints.run import is_run, read_run_metadata
from microdit_jax.checkpoints.weights import describe_weights, load_merged, load_run_params
from microdit_jax.convert.kinds import get_kind
from microdit_jax.convert.shipped import MANIFEST, find_shipped, is_shipped, load_params
from microdit_jax.errors import UserError, visible
from microdit_jax.files import sha256
from microdit_jax.models import dit
from microdit_jax.models.lora import Adapted


class Source(NamedTuple):
    """A model of ours, with weights that are not yet read.

    Attributes:
      made_from: tells its weights from others: checksums, and which of a run's.
      description: says in words what it is, and which weights are taken.
      load: reads the parameters into the memory of the host.
    """

    config: Any
    made_from: dict[str, Any]
    description: str
    load: Callable[[], Params]


def is_ours(path: Path) -> bool:
    """Returns True for what open_source opens: no file or folder of another library."""
    path = find_shipped(path)
    return is_model(path) or is_shipped(path) or is_run(path)


def open_source(
    path: Path, kind: str, weights: str | None = None, base: Path | None = None
) -> Source:
    """Opens a model folder, a training run or the model in the package.

    Args:
      kind: the kind of the model; a run and the model in the package are of kind dit.
      weights: "ema" or "model", of a run that keeps both; None takes the average if there is one,
        as sampling does.
      base: model of ours whose adapters a run has trained, if it is not the one in the package.
    Raises:
      UserError: nothing usable there, a model of another kind, or no such weights.
    """
    path = find_shipped(path)
    if is_shipped(path) or is_run(path):
        _check_kind(path, "dit", kind)
        return _shipped(path, weights) if is_shipped(path) else _run(path, weights, base)
    metadata = read_metadata(path)
    _check_kind(path, metadata["kind"], kind)
    if weights not in (None, "model"):
        raise UserError(
            f"expected one set of weights in the model folder {visible(path)}, found "
            f"--weights={visible(weights, 100)}; choose when converting to it"
        )
    # The manifest has every file's checksum, so its own stands for the whole folder.
    made_from = {"model": sha256(path / "manifest.json")}
    config = get_kind(kind).config_from_dict(metadata[kind])
    said = f"{path}, {metadata['parameters']:,} parameters"
    return Source(config, made_from, said, lambda: load_model(path, sharding=_host())[0])


def _check_kind(path: Path, found: str, wanted: str) -> None:
    if found != wanted:
        raise UserError(
            f"expected a model of kind {wanted} in {visible(path)}, found {visible(found, 60)}; "
            f"give python -m convert --kind={visible(found, 60)}"
        )


def _shipped(path: Path, weights: str | None) -> Source:
    if weights not in (None, "ema"):
        raise UserError(
            f"expected --weights=ema, as {visible(path)} holds the moving average alone, found "
            f"{visible(weights, 100)}; leave it out"
        )
    config = _config(path)
    made_from = {"model": sha256(path / MANIFEST)}
    said = f"{path}, moving average, which is all it holds"
    return Source(config, made_from, said, lambda: load_params(path, abstract_params(config)))


def adapted_network(path: Path) -> Adapted | None:
    """Returns what a run's adapters belong to; None for a run that trained all weights."""
    return Adapted.from_dict(read_run_metadata(path).get("adapted"), f"{path}/config.json")


def _run(path: Path, weights: str | None, base: Path | None = None) -> Source:
    has_ema = read_run_metadata(path, "has_ema")["has_ema"]
    if weights not in (None, "model", "ema") or (weights == "ema" and not has_ema):
        holds = "model and ema" if has_ema else "model alone"
        raise UserError(
            f"expected --weights of those that the run {visible(path)} keeps ({holds}), found "
            f"{visible(weights, 100)}; give one of them"
        )
    ema = has_ema and weights != "model"
    config, (step, _) = _config(path), good_step(path)
    manifest = path / "checkpoints" / str(step) / "manifest.json"
    made_from = {"model": sha256(manifest), "weights": "ema" if ema else "model"}
    other = f"; --weights={'model' if ema else 'ema'} takes the other" if has_ema else ""
    said = describe_weights(path, step, ema=ema) + other
    if (adapted := adapted_network(path)) is not None:
        whole = _base(path, adapted, base)
        said += f", merged into {whole.description}"

        def merged() -> Params:
            return load_merged(path, adapted, whole.load(), whole.description, ema=ema)[0]

        return Source(config, made_from | {"base": adapted.weights}, said, merged)
    return Source(
        config, made_from, said, lambda: load_run_params(path, abstract_params(config), ema=ema)[0]
    )


def _base(path: Path, adapted: Adapted, given: Path | None) -> Source:
    """Opens the network that a run's adapters belong to."""
    found = find_shipped(given or Path(adapted.base))
    if given is None and not is_shipped(found):
        raise UserError(
            f"the adapters in {visible(path)} belong to {visible(adapted.base)}; give it by "
            "--base, as a run or as a folder made by python -m convert"
        )
    if not is_ours(found):
        raise UserError(
            f"--base must be a run or a folder made by python -m convert, found "
            f"{visible(found)}; convert it first"
        )
    return open_source(found, "dit")


def _config(path: Path) -> dit.DiTConfig:
    return get_kind("dit").config_from_dict(read_run_metadata(path, "dit")["dit"])


def _host() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])


def abstract_params(config: dit.DiTConfig) -> Any:
    """Shapes and types of a network's parameters, in the memory of the host."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_host()),
        dit.abstract_params(config),
    )
