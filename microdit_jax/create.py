"""Puts pipelines together: a network by name with its VAE and its text encoder."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from microdit_jax import sharding
from microdit_jax.assets import hub, instant, known_words
from microdit_jax.assets.load import (
    MeshChoice,
    Model,
    load_codec,
    load_model,
    load_text_encoder,
    untrained_model,
)
from microdit_jax.checkpoints.run import is_run, read_run_metadata
from microdit_jax.checkpoints.weights import load_earlier_params
from microdit_jax.data import twemoji
from microdit_jax.encoders import registry
from microdit_jax.encoders.word_vectors import WordVectors
from microdit_jax.errors import UserError, visible
from microdit_jax.machine import memory
from microdit_jax.machine.placement import mesh_of
from microdit_jax.models import ARCHES, arch_of
from microdit_jax.models.dit import DiT
from microdit_jax.sampling.pipeline import LatentDiffusion
from microdit_jax.towers import TextEncoder
from microdit_jax.trees import flatten

DEFAULT_ARCH = next(iter(ARCHES))
MAX_RESOLUTION = 4096  # pixels of a side of a run's images, held out of its training


def create_latent_diffusion(
    vae_name: str = hub.SDXL_VAE,
    text_encoder_name: str = hub.DFN5B_CLIP,
    dit_arch: str = DEFAULT_ARCH,
    latent_res: int = 32,
    in_channels: int = 4,
    pos_interp_scale: float = 1.0,
    dtype: str = "bfloat16",
    checkpoint: str | None = None,
    *,
    ema: bool = True,
    ema_length: float | None = None,
    mesh: MeshChoice = None,
) -> LatentDiffusion:
    """Puts a pipeline together, with the reference's arguments and defaults.

    Args:
      vae_name: name of the VAE, as `assets.load_codec` takes it.
      text_encoder_name: name of the text encoder, as `assets.load_text_encoder` takes it.
      dit_arch: "MicroDiT_XL_2" or "MicroDiT_Tiny_2". The default goes with a checkpoint of any
        sizes, the other with one of its own alone.
      latent_res: side of the latents, 32 for 256 px.
      in_channels: channels of the latents.
      pos_interp_scale: 2 at 512 px.
      dtype: type of the computation, of the network and the towers.
      checkpoint: weights, as `assets.load_model` takes them; None starts from the initialisation.
        "instant", the small model of the package, and a training run bring their own network, codec
        and text encoder; the arguments above but dtype are not used then, unless the run's towers
        are neither its own nor released: these are loaded only if they are named here too. Any
        other must be of the sizes asked for.
      ema: of a training run, the moving average of the weights, if it keeps one.
      ema_length: of a training run, the average of this length from its snapshots.
      mesh: devices to run on: from `sharding.make_mesh`, or `fitting_mesh`; None: the first.
    Raises:
      UserError: something is not there, is damaged, or does not fit the rest.
    """
    if dit_arch not in ARCHES:
        raise UserError(f"dit_arch must be one of {', '.join(ARCHES)}, found {dit_arch}")
    if checkpoint is not None:
        model = load_model(checkpoint, ema=ema, dtype=dtype, mesh=mesh, ema_length=ema_length)
        if model.folder is None:
            asked = {
                "latent_res": (latent_res, model.config.input_size),
                "in_channels": (in_channels, model.config.in_channels),
                "pos_interp_scale": (pos_interp_scale, model.config.pos_interp_scale),
            }
            if dit_arch != DEFAULT_ARCH:
                found = arch_of(model.config.dim, model.config.depth)
                asked["dit_arch"] = (dit_arch, found or DEFAULT_ARCH)
            for name, (wanted, found) in asked.items():
                if wanted != found:
                    raise UserError(
                        f"{checkpoint} has {name} {found}, found {wanted} asked for; pass "
                        f"{name}={found!r}"
                    )
            return from_model(
                model._replace(vae=vae_name, text_encoder=text_encoder_name), dtype=dtype
            )
        # A run has towers of its own, which are loaded from anywhere if they are asked for too.
        model = _with_towers(
            model,
            vae=vae_name if vae_name == model.vae else None,
            text_encoder=text_encoder_name if text_encoder_name == model.text_encoder else None,
        )
        return from_model(model, dtype=dtype)
    text_encoder = load_text_encoder(text_encoder_name, dtype=dtype)
    config = ARCHES[dit_arch](
        input_size=latent_res,
        in_channels=in_channels,
        pos_interp_scale=pos_interp_scale,
        caption_channels=text_encoder.width,
        dtype=dtype,
    )
    model = untrained_model(config, mesh=mesh)._replace(vae=vae_name)
    return from_model(model, dtype=dtype, text_encoder=text_encoder)


def load(
    name: str,
    *,
    vae: str | None = None,
    text_encoder: str | None = None,
    ema: bool = True,
    dtype: str | None = None,
    fsdp: int = 0,
    weights: str | None = None,
    base: str | None = None,
    ema_length: float | None = None,
) -> tuple[LatentDiffusion, Model]:
    """Loads a network by name or path with its towers, on all local devices, for the commands.

    Args:
      name: as `assets.load_model` takes it.
      vae, text_encoder: as `assets.load_codec` and `load_text_encoder` take them; None: those that
        the network is known for.
      ema: of a training run, the moving average of the weights, if it keeps one.
      dtype: type of the computation; None: a training run's own, else bfloat16, on a CPU float32.
      fsdp: devices over which each weight is split; 0: as few as `fitting_mesh` finds.
      weights, base, ema_length: as `assets.load_model` takes them.
    Returns:
      The pipeline and the network.
    Raises:
      UserError: something is not there, is damaged, or does not fit the rest.
    """
    mesh = functools.partial(fitting_mesh, fsdp=fsdp)
    model = load_model(
        name, ema=ema, dtype=dtype, mesh=mesh, weights=weights, base=base, ema_length=ema_length
    )
    if dtype is None and model.folder is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        model = model.with_dtype(dtype)
    model = _with_towers(model, vae=vae, text_encoder=text_encoder)
    return from_model(model, dtype=dtype), model


def _with_towers(model: Model, *, vae: str | None, text_encoder: str | None) -> Model:
    """Returns the model with the towers that a person names, else with its own.

    Raises:
      UserError: its own are of a run that names a path or a repository that is not known.
    """
    if model.folder is not None:
        named = {"vae": model.vae, "text_encoder": model.text_encoder}
        given = {"vae": vae, "text_encoder": text_encoder}
        kept = str(model.folder / "vae")
        chosen = {flag: name for flag, name in named.items() if not given[flag] and name != kept}
        hub.check_known(chosen, model.description)
    return model._replace(vae=vae or model.vae, text_encoder=text_encoder or model.text_encoder)


def from_model(
    model: Model, *, dtype: str | None = None, text_encoder: TextEncoder | None = None
) -> LatentDiffusion:
    """Returns the pipeline of a model, with the codec and the text encoder that it names.

    Args:
      dtype: type of the towers' computation; None keeps their own.
      text_encoder: a text encoder that is loaded already; None loads the model's.
    Raises:
      UserError: one of them is not there, or does not fit the network.
    """
    cfg, mesh = model.config, mesh_of(model.params)
    vae = _named(model.vae, "vae", model)
    if text_encoder is None:
        name = _named(model.text_encoder, "text_encoder", model)
        text_encoder = load_text_encoder(name, dtype=dtype, mesh=mesh)
    if text_encoder.width != cfg.caption_channels:
        raise UserError(
            f"{model.description} takes caption embeddings {cfg.caption_channels} wide, found "
            f"{text_encoder.width} from {text_encoder.name}; give the text encoder that it was "
            "trained with"
        )
    if isinstance(text_encoder, WordVectors):
        text_encoder = dataclasses.replace(text_encoder, known=known_words.of_model(model))
    codec = load_codec(vae, dtype=dtype, mesh=mesh)
    if codec.channels != cfg.in_channels:
        raise UserError(
            f"{model.description} makes latents of {cfg.in_channels} channels, found a VAE for "
            f"{codec.channels}, {codec.name}; give the VAE that it was trained with"
        )
    return LatentDiffusion(
        DiT(cfg),
        model.params,
        model.edm,
        text_encoder,
        codec,
        visible(model.description),
        student=model.student,
    )


def with_weaker(pipe: LatentDiffusion, model: Model, weaker: str | None) -> LatentDiffusion:
    """Returns the pipeline with a network that was trained less, for autoguidance.

    Args:
      model: the pipeline's network.
      weaker: a step of a checkpoint of the same run; or another network, as `load_model` takes it;
        None: the run's oldest checkpoint.
    Raises:
      UserError: there is none, or it is another network.
    """
    if weaker is None or weaker.isdecimal():
        if model.folder is None or not is_run(model.folder) or instant.is_shipped(model.folder):
            raise UserError(
                "an earlier checkpoint is that of a training run, found "
                f"{visible(model.description)}; give a weaker network of the same sizes by --weaker"
            )
        step = None if weaker is None else int(weaker)
        params, description = load_earlier_params(model.folder, pipe.params, step)
    else:
        other = load_model(weaker, mesh=mesh_of(model.params))
        params, description = other.params, other.description

    def shapes(params: Any) -> dict[str, tuple[int, ...]]:
        return {path: leaf.shape for path, leaf in flatten(params).items()}

    if shapes(params) != shapes(pipe.params):
        raise UserError(
            f"autoguidance takes a network of the same sizes, found another, "
            f"{visible(description)}; give an earlier checkpoint of the same run by --weaker"
        )
    return dataclasses.replace(
        pipe, weaker=params, description=f"{pipe.description}, guided by {visible(description)}"
    )


def _named(name: str | None, flag: str, model: Model) -> str:
    """Returns the name of a tower; raises UserError if neither the model nor a flag gave one."""
    if name is None:
        raise UserError(f"expected --{flag}, found none: {model.description} is not known for one")
    return name


def fitting_mesh(num_bytes: int, *, fsdp: int = 0) -> Mesh | None:
    """Returns a mesh of all local devices, which share a batch; None for a single device.

    Args:
      num_bytes: size of the network's weights.
      fsdp: devices over which each weight is split; 0: as few as leave weights room enough.
    """
    devices = jax.local_devices()
    if len(devices) == 1:
        return None
    if not fsdp:
        free = memory.free_bytes(devices[0])
        if free is not None and devices[0].platform == "cpu":
            free //= len(devices)  # simulated devices share one memory
        divisors = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        # Half for the weights; the rest is for towers and activations.
        fits = [n for n in divisors if free is None or num_bytes / n <= free / 2]
        fsdp = min(fits, default=len(devices))
    return sharding.make_mesh(fsdp=fsdp, devices=devices)


def heldout_images(model: Model, count: int) -> tuple[list[str], Float[np.ndarray, "n h w c"]]:
    """Returns captions that a run was not trained on, and the latents of their images.

    Args:
      count: number of captions, spread evenly over those held out, the same every time.
    Raises:
      UserError: not a run on the embedded images, or there are fewer.
    """
    if model.folder is None:
        raise UserError(
            f"held-out captions need a training run, found {model.description}; give prompts"
        )
    needed = ("config.data.heldout.source", "config.data.resolution")
    data = read_run_metadata(model.folder, *needed)["config"]["data"]
    if data["heldout"]["source"] not in twemoji.SETS:
        raise UserError(
            f"held-out captions are those of the embedded images, found a run with held-out data "
            f"from {visible(data['heldout']['source']) or 'nowhere'}; give prompts"
        )
    if not 1 <= data["resolution"] <= MAX_RESOLUTION:
        raise UserError(
            f"expected a run on images of up to {MAX_RESOLUTION} pixels, found "
            f"{data['resolution']}; give prompts"
        )
    images = twemoji.images_of_sets("heldout", known_words.emoji_sets(model))
    if not 1 <= count <= len(images):
        raise UserError(f"expected 1 to {len(images)} held-out captions, found {count} asked for")
    chosen = [images[int(i)] for i in np.linspace(0, len(images) - 1, count)]
    codec = registry.image_codec(_named(model.vae, "vae", model))
    latents = codec.encode(twemoji.read_images(chosen, data["resolution"]))
    return [image.caption for image in chosen], latents * np.float32(codec.scaling_factor)
