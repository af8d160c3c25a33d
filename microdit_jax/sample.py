"""From prompts to pictures: the pipeline, grids, and PNGs that say how they were made."""

import dataclasses
import functools
import json
import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from microdit_jax import assets, checkpoint, diffusion
from microdit_jax.data.latents import Prepared, load_prepared
from microdit_jax.diffusion import EdmConfig
from microdit_jax.encoders import registry
from microdit_jax.errors import UserError, disk_errors
from microdit_jax.models import dit
from microdit_jax.models.dit import DiT
from microdit_jax.noise import initial_noise


@functools.partial(jax.jit, static_argnames=("model", "edm", "num_steps", "guide"))
def sample_latents(
    params: Any,
    caption_latents: Float[Array, "n l caption"],
    noise: Float[Array, "n height width channels"],
    guidance_scale: Float[Array, ""],
    *,
    model: DiT,
    edm: EdmConfig,
    num_steps: int,
    guide: bool,
) -> Float[Array, "n height width channels"]:
    """Latents for caption embeddings and standard normal noise, as one compiled program.

    What depends on the captions alone is computed once, outside the sampling loop.

    Args:
      guidance_scale: weight of guidance; traced, so any value runs the same program.
      guide: whether to guide at all; twice the work.
    """
    y = caption_latents
    if guide:
        y = jnp.concatenate([y, jnp.zeros_like(y)])
    caption = model.apply({"params": params}, y, method="encode_caption")

    def network(x, c_noise):
        return model.apply({"params": params}, x, c_noise, caption, method="predict")[0]

    if guide:
        network = diffusion.guided(network, guidance_scale)
    denoise = diffusion.denoiser(network, edm.sigma_data)
    return diffusion.heun_sampler(denoise, noise, num_steps, edm)


@dataclasses.dataclass(frozen=True)
class LatentDiffusion:
    """A network with its frozen towers: prompts in, pictures out."""

    model: DiT
    params: Any
    edm: EdmConfig
    text_encoder: Any
    codec: Any
    description: str = ""

    def generate(
        self,
        prompt: Sequence[str] | None = None,
        tokenized_prompts: np.ndarray | None = None,
        guidance_scale: float = 5.0,
        num_inference_steps: int = 30,
        seed: int | None = None,
        return_only_latents: bool = False,
        *,
        noise: str = "jax",
        batch_size: int = 32,
        progress: Callable[[Sequence[slice]], Iterable[slice]] = iter,
    ) -> np.ndarray:
        """Draws one picture for each prompt.

        Args:
          prompt: texts.
          tokenized_prompts: token ids (n, l) int32, instead of texts.
          guidance_scale: classifier-free guidance; 1 or less means none.
          num_inference_steps: steps of the sampler, each two network evaluations but the last.
          seed: of the initial noise; None draws one.
          return_only_latents: skip the decoder.
          batch_size: pictures drawn at a time; the last batch is filled up, so that every batch
            runs the same program.
          progress: wraps the sequence of batches, to show a bar.
          noise: "jax", or "torch_cpu" / "torch_cuda" for the reference's own noise.
        Returns:
          float32 (n, H, W, 3) in [0, 1], or latents float32 (n, h, w, channels).
        Raises:
          UserError: no prompt, or a value out of range; latents that are not finite.
        """
        y = self._embed(prompt, tokenized_prompts)
        seed = secrets.randbits(32) if seed is None else seed
        cfg = self.model.config
        x = initial_noise(noise, seed, len(y), cfg.input_size, cfg.input_size, cfg.in_channels)
        size = min(batch_size, len(y))
        latents = np.empty_like(x)
        for rows in progress([slice(i, i + size) for i in range(0, len(y), size)]):
            filled = np.resize(np.arange(len(y))[rows], size)
            drawn = sample_latents(
                self.params,
                jnp.asarray(y[filled]),
                jnp.asarray(x[filled]),
                jnp.float32(guidance_scale),
                model=self.model,
                edm=self.edm,
                num_steps=num_inference_steps,
                guide=guidance_scale > 1,
            )
            latents[rows] = np.asarray(drawn)[: len(latents[rows])]
        if not np.isfinite(latents).all():
            raise UserError(
                "expected finite latents, found NaN or infinity; check the weights, or use "
                "dtype='float32' and a lower guidance_scale"
            )
        return latents if return_only_latents else self.decode(latents)

    def decode(self, latents: Float[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n H W 3"]:
        """Pictures in [0, 1] from scaled latents."""
        images = self.codec.decode(latents / np.float32(self.codec.scaling_factor))
        return np.clip(images / 2 + 0.5, 0, 1).astype(np.float32)

    def _embed(self, prompt, tokenized_prompts) -> np.ndarray:
        if (prompt is None) == (tokenized_prompts is None):
            raise UserError("give either prompt or tokenized_prompts, found both or neither")
        if tokenized_prompts is not None:
            return self.text_encoder.encode(np.asarray(tokenized_prompts, np.int32))
        prompt = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompt:
            raise UserError('expected at least one prompt, found none; give --prompt="..."')
        return self.text_encoder.encode_text(prompt)


def create_latent_diffusion(
    vae_name: str = "stabilityai/stable-diffusion-xl-base-1.0",
    text_encoder_name: str = "openclip:hf-hub:apple/DFN5B-CLIP-ViT-H-14-378",
    dit_arch: str = "MicroDiT_XL_2",
    latent_res: int = 32,
    in_channels: int = 4,
    pos_interp_scale: float = 1.0,
    dtype: str = "bfloat16",
    checkpoint: str | None = None,
) -> LatentDiffusion:
    """Puts a pipeline together, with the reference's arguments and defaults.

    Args:
      vae_name: folder of the image codec.
      text_encoder_name: name of the text encoder.
      dit_arch: "MicroDiT_XL_2" or "MicroDiT_Tiny_2".
      latent_res: side of the latents, 32 for 256 px.
      in_channels: channels of the latents.
      pos_interp_scale: 2 at 512 px.
      dtype: type of the network's computation.
      checkpoint: weights; None starts from the initialisation. A training run brings its own
        network, codec and text encoder; the arguments above are not used then.
    """
    if checkpoint is not None:
        loaded = assets.load_model(checkpoint, dtype=dtype)
        if loaded.folder is not None:
            return from_run(loaded)
        config, params, description = loaded.config, loaded.params, loaded.description
        for name, wanted in (("in_channels", in_channels), ("input_size", latent_res)):
            if getattr(config, name) != wanted:
                raise UserError(
                    f"{checkpoint} has {name} {getattr(config, name)}, found {wanted} asked for; "
                    f"pass {'latent_res' if name == 'input_size' else name}={getattr(config, name)}"
                )
    else:
        arch = getattr(dit, dit_arch, None)
        if dit_arch not in ("MicroDiT_XL_2", "MicroDiT_Tiny_2") or arch is None:
            raise UserError(f"dit_arch must be MicroDiT_XL_2 or MicroDiT_Tiny_2, found {dit_arch}")
        config = arch(
            input_size=latent_res,
            in_channels=in_channels,
            pos_interp_scale=pos_interp_scale,
            dtype=dtype,
        )
        params, description = None, "untrained"
    text_encoder = registry.text_encoder(text_encoder_name)
    codec = registry.image_codec(vae_name)
    if params is None:
        x = jnp.zeros((1, latent_res, latent_res, in_channels))
        y = jnp.zeros((1, 1, config.caption_channels))
        params = jax.jit(DiT(config).init)(jax.random.key(0), x, jnp.zeros(1), y)["params"]
    return LatentDiffusion(DiT(config), params, EdmConfig(), text_encoder, codec, description)


def from_run(model: assets.Model) -> LatentDiffusion:
    """The pipeline of a training run, which names its own text encoder and holds its codec."""
    text_encoder = registry.text_encoder(model.text_encoder)
    codec = registry.image_codec(model.folder / "vae")
    return LatentDiffusion(
        DiT(model.config), model.params, model.edm, text_encoder, codec, model.description
    )


def choose_heldout(data: Prepared, count: int) -> list[int]:
    """Indices of held-out captions, spread evenly, the same every time.

    Raises:
      UserError: there are fewer.
    """
    total = len(data.heldout)
    if not 1 <= count <= total:
        raise UserError(f"expected 1 to {total} held-out captions, found {count} asked for")
    return [int(i) for i in np.linspace(0, total - 1, count)]


def heldout_pictures(model: assets.Model, count: int) -> tuple[list[str], np.ndarray]:
    """Captions that a run was not trained on, and the latents of their pictures."""
    folder = Path(checkpoint.read_run_metadata(model.folder)["config"]["data"]["folder"])
    data = load_prepared(folder, registry.image_codec)
    chosen = choose_heldout(data, count)
    return [data.heldout.captions[i] for i in chosen], data.heldout.latents[chosen]


def to_uint8(images: Float[np.ndarray, "n H W 3"]) -> np.ndarray:
    """[0, 1] floats to bytes, rounded."""
    return np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)


def save_png(path: Path, image: Float[np.ndarray, "H W 3"], settings: dict) -> None:
    """Writes one picture whole or not at all, with its settings as the PNG text "microdit_jax"."""
    info = PngImagePlugin.PngInfo()
    info.add_text("microdit_jax", json.dumps(settings))
    partial = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(to_uint8(image[None])[0]).save(partial, format="PNG", pnginfo=info)
        partial.replace(path)


def captioned_grid(
    rows: Sequence[Float[np.ndarray, "n H W 3"]],
    captions: Sequence[str],
    *,
    columns: int,
    min_side: int = 96,
) -> Float[np.ndarray, "H_grid W_grid 3"]:
    """A sheet of pictures with readable captions.

    Args:
      rows: pictures that belong together, side by side in one cell: (real, sample), say, or just
        one entry; each (n, H, W, 3) in [0, 1].
      captions: one for each cell.
      columns: cells in a row.
      min_side: small pictures are enlarged to at least this many pixels, without smoothing.
    """
    side = rows[0].shape[1]
    scale = -(-min_side // side)
    shown = [to_uint8(images).repeat(scale, axis=1).repeat(scale, axis=2) for images in rows]
    side, pad, font = side * scale, 6, ImageFont.load_default(12)
    width, text_height = len(rows) * side, 44
    cell_width, cell_height = width + 2 * pad, side + text_height + 2 * pad
    lines = -(-len(captions) // columns)
    columns = min(columns, len(captions))
    sheet = Image.new("RGB", (columns * cell_width, lines * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, caption in enumerate(captions):
        left, top = (i % columns) * cell_width + pad, (i // columns) * cell_height + pad
        for j, images in enumerate(shown):
            sheet.paste(Image.fromarray(images[i]), (left + j * side, top))
        text = "\n".join(_wrap(caption, font, width)[:3])
        draw.multiline_text((left, top + side + 2), text, fill="black", font=font, spacing=1)
    return np.asarray(sheet, np.float32) / 255


def _wrap(text: str, font, width: int) -> list[str]:
    """Breaks a caption into lines that are at most `width` pixels wide."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
