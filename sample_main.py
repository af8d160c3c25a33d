"""Samples images from prompts, each with its settings inside the PNG, and a grid of them all.

Examples:
  python sample_main.py --prompt="hot pepper"
  python sample_main.py --model=dit_4_channel_37M_real_and_synthetic_data --seed=2024 \\
    --num_images=4 --prompt="An elegant squirrel pirate on a ship"
  python sample_main.py --model=dit.pt --vae=sdxl/vae --text_encoder=open_clip_pytorch_model.bin \\
    --prompts=prompts.txt
  python sample_main.py --model=out/demo/finetune --prompt="woman mechanic dark skin tone"
  python sample_main.py --image=photo.jpg --strength=0.6 --prompt="red apple"
  python sample_main.py --image=photo.jpg --mask=mask.png --strength=1 --prompt="red apple"
  python sample_main.py --again=out/images/0000_a-red-apple.png
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command(__file__)

import collections
import dataclasses
import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tqdm
from absl import flags

from microdit_jax import model_flags
from microdit_jax.assets import hub, known_words
from microdit_jax.commands.cli import absl_command
from microdit_jax.errors import UserError, visible

if TYPE_CHECKING:  # loading these takes a second, and --help should not
    from microdit_jax.images import ImageSettings
    from microdit_jax.sampling.editing import Edit
    from microdit_jax.sampling.pipeline import LatentDiffusion

MODEL = flags.DEFINE_string(
    "model", hub.INSTANT, "The small one that comes along, a released checkpoint's name, a .pt or "
    ".safetensors file, or a folder: a training run's, or one made by python -m convert."
)  # fmt: skip
PROMPT = flags.DEFINE_multi_string(
    "prompt", [], "What the image is to show; may be given several times."
)
PROMPTS = flags.DEFINE_string("prompts", None, "A text file with a prompt on each line.")
AGAIN = flags.DEFINE_string("again", None, "Sample the image of this file again, by its settings.")
HELDOUT = flags.DEFINE_integer(
    "heldout", 0, "Sample for this many captions held out of training, beside the real images.",
    lower_bound=0,
)  # fmt: skip
NUM_IMAGES = flags.DEFINE_integer("num_images", 1, "Images for each prompt.", lower_bound=1)
STEPS = flags.DEFINE_integer(
    "num_inference_steps", None, "Steps of the solver; default: its own, 30 of Heun's.",
    lower_bound=1, upper_bound=100_000,
)  # fmt: skip
GUIDANCE = flags.DEFINE_float(
    "guidance_scale", None, "Strength of guidance; 1 means none, 0 the unconditional model; "
    "default: that of a run's own evaluations, else 5."
)  # fmt: skip
SEED = flags.DEFINE_list(
    "seed", ["2024"], "Seed of the initial noise, or several: all images for each of them."
)
NOISE = flags.DEFINE_enum(
    "noise", "jax", ["jax", "torch_cpu", "torch_cuda"], "Whose random numbers to start from."
)
BATCH = flags.DEFINE_integer("batch_size", 32, "Images sampled at a time.", lower_bound=1)
WARMUP = flags.DEFINE_boolean(
    "warmup", False, "Compile for these settings first; without prompts: only that."
)
IMAGE = flags.DEFINE_string("image", None, "An image to change, of any size.")
STRENGTH = flags.DEFINE_float(
    "strength", None, "How much to change --image, above 0 and up to 1: the share of the steps "
    "that are taken."
)  # fmt: skip
MASK = flags.DEFINE_string(
    "mask", None, "An image of --image's size, white where that is to be changed."
)
FORMAT = flags.DEFINE_enum(
    "format", "png", ["png", "webp", "jpeg"], "Of the image files; all carry their settings."
)
OUT = flags.DEFINE_string("out", "out", "Folder for the images.")
flags.adopt_module_key_flags(model_flags)

GRID = 60  # images in samples.png, at most
SETTINGS_BYTES = 4096  # of host memory for the path and the settings of one image

# The flags among an image's settings, by the names of images.ImageSettings
SETTINGS = (
    MODEL, *model_flags.IMAGE_FLAGS, STEPS, GUIDANCE, NOISE, *model_flags.SAMPLER_FLAGS,
    model_flags.WEAKER, STRENGTH, IMAGE, MASK,
)  # fmt: skip


@absl_command(words="a prompt goes into --prompt")
def main():
    # After the flags: --help answers at once.
    from microdit_jax import create, images
    from microdit_jax.files import check_writable
    from microdit_jax.machine import memory
    from microdit_jax.machine.compilation_cache import compiled_programs
    from microdit_jax.prepare.given_image import given_image
    from microdit_jax.sampling import guidance, settings

    again = _take_settings(Path(AGAIN.value)) if AGAIN.value else None
    prompts, out, seeds = [again.prompt] if again else _prompts(), Path(OUT.value), _seeds()
    count = (len(prompts) or HELDOUT.value or 1) * NUM_IMAGES.value * len(seeds)
    memory.check_host(
        SETTINGS_BYTES * count,
        what=f"a list of {count} images",
        fix="ask for fewer with --num_images; the same command with another --seed gives more",
    )
    check_writable(out / "images", folder=True)
    check_writable(out / "samples.png")
    given = given_image(IMAGE.value, MASK.value, again)
    kind = model_flags.GUIDANCE.value
    chosen: dict[str, Any] = model_flags.sampler_settings()
    chosen |= {STEPS.name: STEPS.value, STRENGTH.name: STRENGTH.value}
    if GUIDANCE.value is not None:
        chosen[GUIDANCE.name] = GUIDANCE.value
    elif kind == "cfgpp":
        chosen[GUIDANCE.name] = guidance.CFGPP_SCALE
    settings.Sampler(**chosen)  # refuses what does not go together, before anything is loaded
    pipe, model = model_flags.load(MODEL.value)
    edit = pipe.edit(given.image, given.mask)
    if GUIDANCE.value is None and pipe.student is None:
        scale = guidance.default_scale(pipe.text_encoder, kind, model.guidance_scale)
        chosen[GUIDANCE.name] = scale
    sampler = pipe.settings(chosen, edit)
    plan = sampler.plan(pipe.edm)

    real = None
    if HELDOUT.value:
        prompts, latents = create.heldout_images(model, HELDOUT.value)
        real = pipe.decode(latents)
    prompts = [prompt for prompt in prompts for _ in range(NUM_IMAGES.value)]
    if WARMUP.value:
        start = time.perf_counter()
        pipe.warm_up(count, batch_size=BATCH.value, **dataclasses.asdict(sampler))
        print(f"compiled in {time.perf_counter() - start:.1f} s{compiled_programs()}", flush=True)
        if not prompts:
            return
    different = list(dict.fromkeys(prompts))
    for prompt, dropped in zip(different, pipe.dropped(different), strict=True):
        if dropped:
            cut = f"the last {dropped} tokens of this prompt are cut"
            print(f"warning: {cut}: {visible(prompt, most=10_000)}")
    for note in known_words.notes(known_words.of_model(model), different):
        print(f"warning: {note}")

    passes = settings.network_passes(plan)
    print(
        f"{sampler.solver} with {sampler.steps} steps: {len(plan)} evaluations of the network, "
        f"{passes} passes an image"
    )
    shared = {flag.name: flag.value for flag in SETTINGS} | dataclasses.asdict(sampler)
    shared |= {"of": again.of if again else len(prompts), "made_with": pipe.description}
    shared |= {"evaluations": len(plan), "network_passes": passes, **given.checksums}
    written: list[Path] = []
    for seed in seeds:
        wanted = {}
        for i, prompt in enumerate(prompts, start=again.index if again else 0):
            name = images.file_name(i, prompt, FORMAT.value, seed if len(seeds) > 1 else None)
            of_image = shared | {"seed": seed, "prompt": prompt, "index": i}
            wanted[out / "images" / name] = images.ImageSettings.from_dict(of_image)
        _sample(pipe, wanted, dataclasses.asdict(sampler), edit)
        written += wanted
    rows = [np.stack([images.read_png(path) for path in written[:GRID]])]
    if real is not None:
        shown = [i % len(prompts) // NUM_IMAGES.value for i in range(len(rows[0]))]
        rows.insert(0, real[shown])
    captions = prompts * len(seeds)
    grid = images.captioned_grid(rows, captions[:GRID], columns=6)
    about = shared | {"seed": seeds[0] if len(seeds) == 1 else seeds, "prompts": captions[:GRID]}
    images.save_png(out / "samples.png", grid, about)
    shown = f"grid of the first {GRID}" if len(captions) > GRID else "grid"
    print(f"{shown} in {out / 'samples.png'}{compiled_programs()}")


def _seeds() -> list[int]:
    """Returns the seeds of --seed."""
    try:
        seeds = [int(text) for text in SEED.value]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"--seed takes whole numbers divided by commas, found {visible(SEED.value)}"
        ) from error
    if not seeds or not all(0 <= seed < 2**64 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(
            f"--seed takes different numbers from 0 to {2**64 - 1}, found {visible(SEED.value)}"
        )
    return seeds


def _prompts() -> list[str]:
    """The prompts of the flags; none with --heldout, which has its own, or to warm up alone."""
    if sum(map(bool, (PROMPT.value, PROMPTS.value, HELDOUT.value))) > 1:
        raise UserError("give one of --prompt, --prompts and --heldout, found several")
    prompts = list(PROMPT.value)
    if PROMPTS.value:
        try:
            lines = Path(PROMPTS.value).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"expected a text file at {PROMPTS.value}, found {error}") from error
        prompts = [line for line in lines if line.strip()]
    optional = HELDOUT.value or WARMUP.value and not PROMPTS.value
    if not (prompts or optional) or not all(prompt.strip() for prompt in prompts):
        raise UserError('expected a prompt, found an empty one; give --prompt="a red apple"')
    return prompts


def _take_settings(path: Path) -> "ImageSettings":
    """Reads an image's settings, and takes them for all flags that are not given."""
    from microdit_jax import images

    if PROMPT.value or PROMPTS.value or HELDOUT.value or NUM_IMAGES.value != 1:
        raise UserError("--again samples one image from its own prompt; give no other prompts")
    settings = images.ImageSettings.from_dict(images.read_settings(path))
    if model_flags.SOLVER.present:  # another solver takes its own schedule
        settings = dataclasses.replace(settings, schedule=None, churn=None)
    if model_flags.GUIDANCE.present:
        settings = dataclasses.replace(settings, guidance_interval=None, apg=None)
    taken = [flag.name for flag in SETTINGS if not flags.FLAGS[flag.name].present]
    files = (MODEL.name, model_flags.VAE.name, model_flags.TEXT_ENCODER.name)
    loaded = {name: getattr(settings, name) for name in files if name in taken}
    weaker = model_flags.WEAKER.name
    if weaker in taken and settings.weaker is not None and not settings.weaker.isdecimal():
        loaded[weaker] = settings.weaker
    hub.check_known(loaded, path)
    for name in taken:
        flags.FLAGS[name].value = getattr(settings, name)
    if not SEED.present:
        flags.FLAGS[SEED.name].value = [str(settings.seed)]
    towers = [f"{name} {visible(flags.FLAGS[name].value or 'its own')}" for name in files]
    print(
        f"{visible(path)}: image {settings.index} of {settings.of}, {visible(settings.prompt)}; "
        f"with {', '.join(towers)}; {STEPS.value} steps",
        flush=True,
    )
    return settings


def _sample(
    pipe: "LatentDiffusion",
    wanted: "dict[Path, ImageSettings]",
    sampler: dict[str, Any],
    edit: "Edit | None",
) -> None:
    """Samples the images that are not there yet, a batch at a time, and saves each at once."""
    from microdit_jax.images import is_made_so, save_image

    missing = {
        settings.index: (path, settings)
        for path, settings in wanted.items()
        if not is_made_so(path, dataclasses.asdict(settings))
    }
    if len(missing) < len(wanted):
        print(f"{len(wanted) - len(missing)} of {len(wanted)} images are there already")
    if not missing:
        return
    _, settings = next(iter(missing.values()))
    seconds = collections.defaultdict(float)
    for batch in pipe.sample(
        [settings.prompt for _, settings in missing.values()],
        indices=list(missing),
        total=settings.of,
        seed=settings.seed,
        noise=settings.noise,
        batch_size=min(BATCH.value, len(missing)),
        progress=functools.partial(tqdm.tqdm, desc="sampling", unit="eval"),
        edit=edit,
        **sampler,
    ):
        for index, image in zip(batch.indices, batch.images, strict=True):
            path, settings = missing[index]
            save_image(path, image, dataclasses.asdict(settings), FORMAT.value)
        for part, value in batch.seconds.items():
            seconds[part] += value
    print(", ".join(f"{part} {value:.1f} s" for part, value in seconds.items()))
    whole = sum(seconds.values())
    print(f"{len(missing)} images in {whole:.1f} s, {len(missing) / whole:.3g} images/s")
