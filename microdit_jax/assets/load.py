"""Loads networks, VAEs and text encoders by name or path.

A name is that of the model in the package, of a released checkpoint, or of a repository (hub.py
fetches it). A path is that of a PyTorch or safetensors file or a folder of one, of a model folder
(python -m convert), or of a training run. PyTorch files are converted once, into the user's cache
folder, where the next run finds them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from microdit_jax import sharding
from microdit_jax.assets import hub, instant, minilm
from microdit_jax.assets.conversion import converted
from microdit_jax.checkpoints import model_folder
from microdit_jax.checkpoints.fetch import local_model
from microdit_jax.checkpoints.run import guidance_scale_of, is_run, read_run_metadata
from microdit_jax.checkpoints.weights import describe_weights, load_merged, load_run_params
from microdit_jax.convert import bert, clip_text, t5, vae
from microdit_jax.convert.arguments import config_from_fields, tower_name
from microdit_jax.convert.dit import config_from_dict
from microdit_jax.convert.inputs import holds_weights, read_config
from microdit_jax.diffusion import EdmConfig
from microdit_jax.encoders import registry
from microdit_jax.errors import UserError, visible
from microdit_jax.files.urls import with_urls
from microdit_jax.models import dit
from microdit_jax.models.dit import DiTConfig, for_this_machine
from microdit_jax.models.lora import Adapted
from microdit_jax.sampling.student import Student
from microdit_jax.towers import Codec, TextEncoder

# Devices for a network's weights: a mesh, None for the first local device, or a function that
# chooses one of these by the weights' size in bytes.
MeshChoice = Mesh | Callable[[int], Mesh | None] | None


class Model(NamedTuple):
    """A network with its weights and the towers that it was trained with.

    Attributes:
      vae, text_encoder: as load_codec and load_text_encoder take them; None if unknown.
      folder: of the training run or the shipped model, whose config.json names its data.
      description: tells a person what was loaded.
      student: of a few-step student, what its teacher was.
      ema_length: of an average that was made from a run's snapshots.
      guidance_scale: that a run evaluates itself with; None if unknown.
    """

    config: DiTConfig
    params: Any
    edm: EdmConfig
    vae: str | None
    text_encoder: str | None
    folder: Path | None
    description: str
    student: Student | None = None
    ema_length: float | None = None
    guidance_scale: float | None = None

    def with_dtype(self, dtype: str) -> "Model":
        """Returns the model with another dtype of the computation."""
        return self._replace(config=dataclasses.replace(self.config, dtype=dtype))


def load_model(
    name: str,
    *,
    ema: bool = True,
    dtype: str | None = None,
    mesh: MeshChoice = None,
    weights: str | None = None,
    with_params: bool = True,
    base: str | None = None,
    ema_length: float | None = None,
) -> Model:
    """Loads a network by name or path.

    Args:
      name: "instant" or "instant2", those in the package; the name of a released checkpoint, with
        or without ".pt"; or the path of a .pt or .safetensors file, of a model folder (python -m
        convert), or of a training run.
      ema: take the moving average of a training run's weights, if it keeps one.
      dtype: type of the computation; None keeps the model's own.
      mesh: devices for the weights, which are split by the rules of sharding.py.
      weights: "model", "ema" or keys joined by dots, of a PyTorch file that holds several.
      base: of a run that trained adapters, the network that they belong to; None: the one that it
        names.
      ema_length: of a training run, make the average of this length (sigma_rel) from its snapshots.
      with_params: load the weights; else `params` is None, and the rest is there in a moment.
    Raises:
      UserError: nothing usable there, or damaged.
    """
    wanted = ema_length is not None
    path, released = local_model(name, snapshots=wanted), hub.RELEASED.get(name.removesuffix(".pt"))
    if released and not path.exists():
        path = hub.released_checkpoint(name)
    path = instant.find_shipped(path)
    foreign = path.is_file() or (path.is_dir() and not _is_ours(path) and holds_weights(path))
    if weights is not None and not foreign:
        raise UserError(
            f"expected a PyTorch file to take the weights {visible(weights, 100)} of, found "
            f"{visible(name)}; leave them out (--noema takes a training run's raw weights)"
        )
    if wanted and (not ema or instant.is_shipped(path) or not (path.is_dir() and is_run(path))):
        raise UserError(
            "--ema_length is for a training run that keeps snapshots, without --noema, found "
            f"{visible(name)}{'' if ema else ' and --noema'}; leave it out"
        )
    if instant.is_shipped(path):
        model = _from_shipped(path, ema, mesh, with_params)
    elif is_run(path):
        model = _from_run(path, mesh, with_params, base, ema=ema, ema_length=ema_length)
    elif foreign:
        model = _from_folder(converted("dit", path, weights=weights), mesh, with_params)
        model = model._replace(description=path.name)
    elif path.is_dir():
        model = _from_folder(path, mesh, with_params)
    else:
        raise UserError(
            "--model must be a training run, a folder made by python -m convert, a .pt or "
            f".safetensors file, or one of {', '.join((*hub.INSTANTS, *hub.RELEASED))}, found "
            f"nothing at {name}"
        )
    if model.folder is None:
        vae_name = hub.DEFAULT_VAES.get(model.config.in_channels)
        model = model._replace(vae=vae_name, text_encoder=hub.DFN5B_CLIP)
    model = model if dtype is None else model.with_dtype(dtype)
    description = with_urls(model.description)
    return model._replace(config=for_this_machine(model.config), description=description)


def _is_ours(folder: Path) -> bool:
    return instant.is_shipped(folder) or is_run(folder) or model_folder.is_model(folder)


def untrained_model(config: DiTConfig, *, mesh: MeshChoice = None) -> Model:
    """Initialises a network; the model names no VAE and no text encoder."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(config, mesh))
    init = functools.partial(dit.init_params, config)
    params = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    return Model(config, params, EdmConfig(), None, None, None, "untrained")


def abstract_params(config: DiTConfig, mesh: MeshChoice = None) -> Any:
    """Shapes, types and shardings of a network's parameters."""
    shapes = dit.abstract_params(config)
    if not isinstance(mesh, Mesh | None):
        mesh = mesh(sum(math.prod(s.shape) * s.dtype.itemsize for s in jax.tree.leaves(shapes)))
    if mesh is not None:
        return sharding.with_shardings(shapes, mesh)
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=first), shapes
    )


def _from_folder(folder: Path, mesh: MeshChoice, with_params: bool) -> Model:
    metadata = model_folder.read_metadata(folder)
    if metadata["kind"] != "dit":
        raise UserError(
            f"expected a model of kind dit in {folder}, found {metadata['kind']}; that is not the "
            "network: give it to --vae or --text_encoder"
        )
    config = config_from_dict(metadata["dit"])
    params = None
    if with_params:
        abstract = abstract_params(config, mesh)
        model_folder.check_network(folder, abstract)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        params, _ = model_folder.load_model(folder, sharding=shardings)
    return Model(config, params, EdmConfig(), None, None, None, f"{folder}")


# Parts of a run's config.json that a model is made from
_NEEDED = ("dit", "edm", "has_ema", "config.data.vae", "config.data.text_encoder")


def _from_shipped(path: Path, ema: bool, mesh: MeshChoice, with_params: bool) -> Model:
    if not ema:
        raise UserError(
            f"expected the moving average to be asked for, as {path} holds nothing else, found "
            "ema=False; leave out --noema"
        )
    metadata = read_run_metadata(path, *_NEEDED)
    config = config_from_dict(metadata["dit"])
    params = instant.load_params(path, abstract_params(config, mesh)) if with_params else None
    named = (f"the {name} model" for name, folder in instant.FOLDERS.items() if folder == path)
    name = next(named, f"{path}")
    return _of_run(metadata, config, params, path, name)


def _from_run(
    path: Path, mesh: MeshChoice, with_params: bool, base: str | None, **which: Any
) -> Model:
    """Loads a run; `which` are `ema` and `ema_length`, as `load_run_params` takes them."""
    metadata = read_run_metadata(path, *_NEEDED)
    config, which["ema"] = config_from_dict(metadata["dit"]), which["ema"] and metadata["has_ema"]
    if not with_params:
        return _of_run(metadata, config, None, path, f"{path}")
    adapted = Adapted.from_dict(metadata.get("adapted"), f"{path}/config.json")
    if adapted is not None:
        params, step = _merged(path, adapted, mesh, base, **which)
    else:
        params, step = load_run_params(path, abstract_params(config, mesh), **which)
    model = _of_run(metadata, config, params, path, describe_weights(path, step, **which))
    return model._replace(ema_length=which["ema_length"])


def _merged(
    path: Path, adapted: Adapted, mesh: MeshChoice, base: str | None, **which: Any
) -> tuple[Any, int]:
    """Loads a run's adapters and the network that they belong to, and merges them."""
    if base is None:
        hub.check_known({"base": adapted.base}, path)
    name = base or adapted.base
    return load_merged(path, adapted, load_model(name, mesh=mesh).params, name, **which)


def _of_run(metadata: dict, config: DiTConfig, params: Any, path: Path, description: str) -> Model:
    """Makes the model of a run from its parameters, its config.json, and the codec it keeps."""
    # The towers are those that its config names; its data may know them by checksums.
    kept, towers = path / "vae", metadata["config"]["data"]
    return Model(
        config,
        params,
        config_from_fields(EdmConfig, metadata["edm"]),
        str(kept) if kept.is_dir() and not kept.is_symlink() else towers["vae"],
        towers["text_encoder"],
        path,
        description,
        Student.from_dict(metadata.get("student"), f"{path}/config.json"),
        guidance_scale=guidance_scale_of(metadata),
    )


_TEXT_KINDS = {"clip_text": clip_text, "t5": t5, "bert": bert}


def load_text_encoder(
    name: str, *, dtype: str | None = None, mesh: Mesh | None = None
) -> TextEncoder:
    """Loads a frozen text encoder.

    Args:
      name: "table:width=W,tokens=L,seed=S" or "words:tokens=L"; or "minilm:tokens=L"; or the path
        of a CLIP, T5 or BERT as a file, as a folder of its library, or converted; or as
        hub.text_encoder takes it. A T5's and a BERT's folder has its tokenizer.
      dtype: type of the computation; None keeps the model's own.
      mesh: the devices that share the work, each with all weights; None: the first local device.
    """
    if registry.is_text_encoder(name):
        return registry.text_encoder(name)
    options: dict[str, Any] = {}
    path, given_name = Path(name), None
    packaged = minilm.is_name(name)
    if packaged:
        given_name, options = minilm.full_name(name), {"max_tokens": minilm.tokens_of(name)}
        path = minilm.package_folder()
    elif not path.exists():
        path, given_name = hub.text_encoder(name), name
    folder = _text_folder(path)
    about = model_folder.read_metadata(folder)
    kind = about["kind"]
    if packaged:
        minilm.check_weights(about["source"]["sha256"])
    beside = path if path.is_dir() else path.parent
    source = path / "tokenizer" if folder == path else beside
    if kind != "clip_text" and source.is_dir():
        options["tokenizer"] = str(source)
    return _TEXT_KINDS[kind].load_encoder(
        folder, given_name, dtype=dtype, sharding=_copies(mesh), batch=_tower_batch(), **options
    )


def load_codec(name: str, *, dtype: str | None = None, mesh: Mesh | None = None) -> Codec:
    """Loads a frozen image codec.

    Args:
      name: the path of a VAE, as a file beside its config.json, as a folder, or converted, or of
        the codec that a run on small data made; or as hub.vae takes it.
      dtype: type of the computation; None keeps the model's own.
      mesh: the devices that share the work, each with all weights; None: the first local device.
    """
    path, given_name = Path(name), None
    if (path / "codec.json").is_file():
        return registry.image_codec(path)
    if not path.exists():
        path, given_name = hub.vae(name), name
    # The reference multiplies by scaling_factor alone, whatever its own VAEs' files say.
    own = {"shift_factor": 0.0} if given_name in hub.DEFAULT_VAES.values() else {}
    return vae.load_codec(_vae_folder(path, own), given_name, dtype=dtype, sharding=_copies(mesh))


def names_in_data(codec: str, text_encoder: str) -> dict[str, str]:
    """Returns the names that data made with these towers carry, without loading them.

    They are the `name` of what `load_codec` and `load_text_encoder` load: for a path the checksum
    of the weights, else the name given here.
    """

    def name(given: str, folder_of: Callable[[Path], Path]) -> str:
        path = Path(given)
        if (path / "codec.json").is_file():
            return registry.image_codec(path).name
        return tower_name(model_folder.read_metadata(folder_of(path))) if path.exists() else given

    if minilm.is_name(text_encoder):
        text_encoder = minilm.full_name(text_encoder)
    return {"vae": name(codec, _vae_folder), "text_encoder": name(text_encoder, _text_folder)}


def _vae_folder(path: Path, given: Mapping[str, Any] | None = None) -> Path:
    return path if model_folder.is_model(path) else converted("vae", path, given)


def _text_folder(path: Path) -> Path:
    """Returns the model folder of a text encoder: its path itself, or the cached conversion."""
    folder = path if model_folder.is_model(path) else converted(_text_kind(path), path)
    kind = model_folder.read_metadata(folder)["kind"]
    if kind not in _TEXT_KINDS:
        raise UserError(f"expected a text encoder at {path}, found a model of kind {kind}")
    return folder


def _text_kind(path: Path) -> str:
    """Tells a T5 and a BERT from a CLIP by the config.json in a folder or beside a file."""
    beside = read_config((path if path.is_dir() else path.parent) / "config.json") or {}
    if beside.get("model_type") == "bert" or "type_vocab_size" in beside:
        return "bert"
    return "t5" if beside.get("model_type") == "t5" or "d_kv" in beside else "clip_text"


def _copies(mesh: Mesh | None) -> jax.sharding.Sharding | None:
    return None if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def _tower_batch() -> int:
    """Returns how many texts a tower embeds at a time; few on a CPU, which gains nothing."""
    return 2 if jax.default_backend() == "cpu" else 32
