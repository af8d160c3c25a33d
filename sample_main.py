"""Draws pictures from prompts, each with its settings inside the PNG, and a grid of them all.

Examples:
  python sample_main.py --prompt="hot pepper"
  python sample_main.py --model=dit_4_channel_37M_real_and_synthetic_data --seed=2024 \\
    --num_images=4 --prompt="An elegant squirrel pirate on a ship"
  python sample_main.py --model=dit.pt --vae=sdxl/vae --text_encoder=open_clip_pytorch_model.bin \\
    --prompts=prompts.txt
  python sample_main.py --model=out/demo/finetune --prompt="woman mechanic dark skin tone"
  python sample_main.py --again=out/images/0000_a-red-apple.png
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command(__file__)

import collections
import functools
import math
import time
from pathlib import Path

import numpy as np
import tqdm
from absl import flags

from microdit_jax import model_flags
from microdit_jax.assets import hub
from microdit_jax.commands.cli import absl_command, compiled_programs
from microdit_jax.errors import UserError

MODEL = flags.DEFINE_string(
    "model", hub.INSTANT, "The small one that comes along, a released checkpoint's name, a .pt or "
    ".safetensors file, or a folder: a training run's, or one made by python -m convert."
)  # fmt: skip
PROMPT = flags.DEFINE_multi_string("prompt", [], "What to draw; may be given several times.")
PROMPTS = flags.DEFINE_string("prompts", None, "A text file with a prompt on each line.")
AGAIN = flags.DEFINE_string("again", None, "Make the picture of this PNG again, from its settings.")
HELDOUT = flags.DEFINE_integer(
    "heldout", 0, "Draw this many captions held out of training, beside the real pictures."
)
NUM_IMAGES = flags.DEFINE_integer("num_images", 1, "Pictures for each prompt.", lower_bound=1)
STEPS = flags.DEFINE_integer("num_inference_steps", 30, "Steps of the sampler.", lower_bound=1)
GUIDANCE = flags.DEFINE_float(
    "guidance_scale", None, "Classifier-free guidance; 1 means none; default: 5, of a network that "
    "was trained on the embedded pictures 3."
)  # fmt: skip
flags.register_validator(
    GUIDANCE, lambda scale: scale is None or math.isfinite(scale), "expected a finite number"
)
SEED = flags.DEFINE_integer("seed", 2024, "Seed of the initial noise.", lower_bound=0)
NOISE = flags.DEFINE_enum(
    "noise", "jax", ["jax", "torch_cpu", "torch_cuda"], "Whose random numbers to start from."
)
BATCH = flags.DEFINE_integer("batch_size", 32, "Pictures drawn at a time.", lower_bound=1)
WARMUP = flags.DEFINE_boolean(
    "warmup", False, "Compile for these settings first; without prompts: only that."
)
OUT = flags.DEFINE_string("out", "out", "Folder for the pictures.")
flags.adopt_module_key_flags(model_flags)

GRID = 60  # pictures in samples.png, at most

# What a picture is made of, and its PNG tells
SETTINGS = (MODEL, *model_flags.OF_A_PICTURE, STEPS, GUIDANCE, SEED, NOISE)


@absl_command(words="a prompt goes into --prompt")
def main():
    # After the flags: --help answers at once.
    from microdit_jax import create
    from microdit_jax import images as pictures

    picture = _take_settings(pictures.read_settings(Path(AGAIN.value))) if AGAIN.value else None
    prompts = [picture["prompt"]] if picture else _prompts()
    pipe, model = model_flags.load(MODEL.value)
    if GUIDANCE.value is None:
        flags.FLAGS[GUIDANCE.name].value = create.usual_guidance(pipe)

    rows = []
    if HELDOUT.value:
        prompts, real = create.heldout_pictures(model, HELDOUT.value)
        rows.append(pipe.decode(real).repeat(NUM_IMAGES.value, axis=0))
    prompts = [prompt for prompt in prompts for _ in range(NUM_IMAGES.value)]
    if WARMUP.value:
        start, count = time.perf_counter(), len(prompts) or NUM_IMAGES.value
        pipe.warm_up(count, batch_size=BATCH.value, guide=GUIDANCE.value > 1)
        print(f"compiled in {time.perf_counter() - start:.1f} s{compiled_programs()}", flush=True)
        if not prompts:
            return
    for prompt, dropped in zip(prompts, pipe.dropped(prompts), strict=True):
        if dropped:
            print(f"warning: the last {dropped} tokens of this prompt are cut: {prompt}")

    chosen = [picture["index"]] if picture else list(range(len(prompts)))
    total = picture["of"] if picture else len(prompts)
    settings = {flag.name: flag.value for flag in SETTINGS} | {"of": total}
    settings["made_with"] = pipe.description
    out, wanted = Path(OUT.value), {}
    for i, prompt in zip(chosen, prompts, strict=True):
        path = out / "images" / pictures.file_name(i, prompt)
        wanted[path] = settings | {"prompt": prompt, "index": i}
    _sample(pipe, wanted, total)
    images = np.stack([pictures.read_png(path) for path in list(wanted)[:GRID]])
    rows = [real[:GRID] for real in rows]
    grid = pictures.captioned_grid([*rows, images], prompts[:GRID], columns=6)
    pictures.save_png(out / "samples.png", grid, settings | {"prompts": prompts[:GRID]})
    shown = f"grid of the first {GRID}" if len(prompts) > GRID else "grid"
    print(f"{shown} in {out / 'samples.png'}{compiled_programs()}")


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


def _take_settings(picture: dict) -> dict:
    """Takes the settings of a PNG for all flags that are not given, and returns them."""
    if missing := {"prompt", "index", "of", *(f.name for f in SETTINGS)} - set(picture):
        raise UserError(
            f"expected the PNG of one picture in --again, found one that does not say "
            f"{', '.join(sorted(missing))}; take one from the folder images/"
        )
    if PROMPT.value or PROMPTS.value or HELDOUT.value or NUM_IMAGES.value != 1:
        raise UserError("--again draws one picture from its own prompt; give no other prompts")
    for flag in SETTINGS:
        if not flags.FLAGS[flag.name].present:
            flags.FLAGS[flag.name].value = picture[flag.name]
    return picture


def _sample(pipe, wanted: dict[Path, dict], total: int) -> None:
    """Samples the images that are not there yet, a batch at a time, and saves each at once."""
    from microdit_jax.images import is_made_so, save_png

    missing = [path for path, settings in wanted.items() if not is_made_so(path, settings)]
    if len(missing) < len(wanted):
        print(f"{len(wanted) - len(missing)} of {len(wanted)} images are there already")
    if not missing:
        return
    path_of = {wanted[path]["index"]: path for path in missing}
    seconds = collections.defaultdict(float)
    for batch in pipe.sample(
        [wanted[path]["prompt"] for path in missing],
        indices=list(path_of),
        total=total,
        seed=SEED.value,
        guidance_scale=GUIDANCE.value,
        num_inference_steps=STEPS.value,
        noise=NOISE.value,
        batch_size=min(BATCH.value, len(missing)),
        progress=functools.partial(tqdm.tqdm, desc="sampling", unit="eval"),
    ):
        for index, image in zip(batch.indices, batch.images, strict=True):
            save_png(path_of[index], image, wanted[path_of[index]])
        for part, value in batch.seconds.items():
            seconds[part] += value
    print(", ".join(f"{part} {value:.1f} s" for part, value in seconds.items()))
    whole = sum(seconds.values())
    print(f"{len(missing)} images in {whole:.1f} s, {len(missing) / whole:.3g} images/s")
