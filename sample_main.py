"""Draws pictures from prompts, each with its settings inside the PNG, and a grid of them all.

Examples:
  python sample_main.py --model=out/demo/finetune --prompt="woman mechanic dark skin tone"
  python sample_main.py --model=out/demo/finetune --heldout=24 --out=out/demo
"""

import re
import time
from pathlib import Path

import tqdm
from absl import app, flags

from microdit_jax.cli import run
from microdit_jax.errors import UserError

MODEL = flags.DEFINE_string("model", None, "A training run's workdir.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "What to draw; may be given several times.")
HELDOUT = flags.DEFINE_integer(
    "heldout", 0, "Draw this many captions held out of training, beside the real pictures."
)
NUM_IMAGES = flags.DEFINE_integer("num_images", 1, "Pictures for each prompt.", lower_bound=1)
STEPS = flags.DEFINE_integer("num_inference_steps", 30, "Steps of the sampler.", lower_bound=1)
GUIDANCE = flags.DEFINE_float("guidance_scale", 5.0, "Classifier-free guidance; 1 means none.")
SEED = flags.DEFINE_integer("seed", 2024, "Seed of the initial noise.", lower_bound=0)
NOISE = flags.DEFINE_enum(
    "noise", "jax", ["jax", "torch_cpu", "torch_cuda"], "Whose random numbers to start from."
)
BATCH = flags.DEFINE_integer("batch_size", 32, "Pictures drawn at a time.", lower_bound=1)
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Type of the computation; default: the model's own."
)
EMA = flags.DEFINE_boolean("ema", True, "Use the moving average of the weights where there is one.")
OUT = flags.DEFINE_string("out", "out", "Folder for the pictures.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; a prompt goes into --prompt")
    # After the flags: --help answers at once.
    from microdit_jax import assets, sample

    start = time.perf_counter()
    model = assets.load_model(MODEL.value, ema=EMA.value, dtype=DTYPE.value)
    if model.folder is None:
        raise UserError(
            f"--model must be a training run, which holds its codec; found {MODEL.value}"
        )
    pipe = sample.from_run(model)
    print(f"{pipe.description}: loaded in {time.perf_counter() - start:.1f} s")

    rows, prompts = [], list(PROMPT.value)
    if HELDOUT.value:
        if prompts:
            raise UserError("give either --prompt or --heldout, found both")
        prompts, real = sample.heldout_pictures(model, HELDOUT.value)
        rows.append(pipe.decode(real))
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise UserError('expected a prompt, found an empty one; give --prompt="a red apple"')
    prompts = [prompt for prompt in prompts for _ in range(NUM_IMAGES.value)]

    settings = {
        "model": pipe.description,
        "num_inference_steps": STEPS.value,
        "guidance_scale": GUIDANCE.value,
        "seed": SEED.value,
        "noise": NOISE.value,
    }
    start = time.perf_counter()
    images = pipe.generate(
        prompts,
        guidance_scale=GUIDANCE.value,
        num_inference_steps=STEPS.value,
        seed=SEED.value,
        noise=NOISE.value,
        batch_size=BATCH.value,
        progress=lambda batches: tqdm.tqdm(batches, desc="sampling", unit="batch"),
    )
    seconds = time.perf_counter() - start
    out = Path(OUT.value)
    for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
        about = settings | {"prompt": prompt, "index": i}
        sample.save_png(out / "images" / f"{i:04d}_{slug}.png", image, about)
    if HELDOUT.value:
        rows[0] = rows[0].repeat(NUM_IMAGES.value, axis=0)
    grid = sample.captioned_grid([*rows, images], prompts, columns=6)
    sample.save_png(out / "samples.png", grid, settings | {"prompts": prompts})
    print(f"{len(images)} pictures in {seconds:.1f} s, grid in {out / 'samples.png'}")


if __name__ == "__main__":
    flags.mark_flag_as_required("model")
    run(main)
