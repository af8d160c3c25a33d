"""Solvers and numbers of steps against the converged solution: error, seconds, network passes.

  python -m benchmarks.sampling --num_prompts=32 --guidance_scale=3,5 --out=out/sampling

The converged solution of a (prompt, noise, guidance scale) is Heun's of 200 steps. An error is the
relative L2 distance of the latents to it, over all images; the median is that of the images one by
one, which a few images that ended elsewhere do not move. Prompts are captions of the embedded emoji
images, spread evenly. Results go to result.json, with a table and a plot beside it; solutions are
kept there, so the same command again is quicker.
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command("benchmarks.sampling")

import dataclasses
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from jaxtyping import Float
from matplotlib.figure import Figure

from microdit_jax import model_flags
from microdit_jax.assets import hub
from microdit_jax.commands.cli import absl_command
from microdit_jax.evaluate.prompts import read_prompts
from microdit_jax.files import check_writable, write_bytes, write_text
from microdit_jax.noise import initial_noise
from microdit_jax.sampling.pipeline import LatentDiffusion
from microdit_jax.sampling.settings import Sampler, network_passes

MODEL = flags.DEFINE_string("model", hub.INSTANT, "A network, as for sample_main.py.")
PROMPTS = flags.DEFINE_integer("num_prompts", 32, "Captions, an image each.", lower_bound=1)
SCALES = flags.DEFINE_list("guidance_scale", ["3", "5"], "Guidance scales.")
SEED = flags.DEFINE_integer("seed", 1, "Of the initial noise.")
BATCH = flags.DEFINE_integer("batch_size", 32, "Images sampled at a time.", lower_bound=1)
OUT = flags.DEFINE_string("out", "out/sampling", "Folder for everything.")
flags.adopt_module_key_flags(model_flags)

CONVERGED = 200  # steps of Heun's
GRID = (
    *({"solver": "heun", "num_inference_steps": n} for n in (10, 13, 18, 24, 30, 50)),
    *(
        {"solver": solver, "schedule": schedule, "num_inference_steps": n}
        for solver in ("ab2", "sab2", "ab3")
        for schedule in ("log", "dense")
        for n in (12, 14, 16, 20, 25)
    ),
    *(
        {"solver": solver, "schedule": schedule, "num_inference_steps": n}
        for solver in ("dpmpp_2m", "unipc")
        for schedule in ("edm", "dense")
        for n in (16, 20, 25)
    ),
    {"solver": "euler", "num_inference_steps": 50},
)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Embedded captions (n, l, caption) and noise (n, h, w, c) that all samplers start from."""

    captions: Float[np.ndarray, "n l caption"]
    noise: Float[np.ndarray, "n h w c"]


def make_inputs(pipe: LatentDiffusion) -> Inputs:
    """Embeds captions spread over the training set, and makes their noise."""
    prompts = read_prompts("train", PROMPTS.value).texts
    cfg = pipe.model.config
    shape = cfg.input_size, cfg.input_size, cfg.in_channels
    noise = np.asarray(initial_noise("jax", SEED.value, len(prompts), *shape))
    return Inputs(pipe.encode(prompts), noise)


def sampled(pipe: LatentDiffusion, inputs: Inputs, sampler: Sampler) -> Float[np.ndarray, "n *z"]:
    """Samples the latents of all captions."""
    options = dataclasses.asdict(sampler)
    return pipe.denoise(inputs.captions, inputs.noise, batch_size=BATCH.value, **options)


def converged(
    pipe: LatentDiffusion, inputs: Inputs, scale: float, folder: Path
) -> Float[np.ndarray, "n *z"]:
    """Returns the converged solution, from its file if it is there."""
    name = f"converged_{len(inputs.noise)}_{SEED.value}_{scale:g}.npy"
    if not (folder / name).exists():
        sampler = Sampler(num_inference_steps=CONVERGED, guidance_scale=scale)
        file = io.BytesIO()
        np.save(file, sampled(pipe, inputs, sampler))
        write_bytes(folder / name, file.getvalue())
    return np.load(folder / name)


def measure(
    pipe: LatentDiffusion, inputs: Inputs, sampler: Sampler, solution: Float[np.ndarray, "n *z"]
) -> dict[str, Any]:
    """Samples once, and compares with the converged solution."""
    plan, start = sampler.plan(pipe.edm), time.perf_counter()
    found = sampled(pipe, inputs, sampler)
    seconds = time.perf_counter() - start
    square = np.square(found - solution).reshape(len(found), -1).sum(axis=1)
    size = np.square(solution).reshape(len(found), -1).sum(axis=1)
    return {
        **dataclasses.asdict(sampler),
        "evaluations": len(plan),
        "network_passes": network_passes(plan),
        "error": float(np.sqrt(square.sum() / size.sum())),
        "median": float(np.median(np.sqrt(square / size))),
        "seconds_an_image": seconds / len(found),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Returns a Markdown table of the results."""
    lines = ["| guidance | solver | schedule | evaluations | passes | error | median | s/image |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        lines.append(
            f"| {row['guidance_scale']:g} | {row['solver']} | {row['schedule']} | "
            f"{row['evaluations']} | {row['network_passes']} | {row['error']:.4f} | "
            f"{row['median']:.4f} | {row['seconds_an_image']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]]) -> bytes:
    """Draws the error over network passes, a panel for each guidance scale, as a PNG."""
    scales = sorted({row["guidance_scale"] for row in rows})
    figure = Figure(figsize=(5 * len(scales), 4), layout="constrained", dpi=110)
    panels = figure.subplots(1, len(scales), sharey=True, squeeze=False)[0]
    for panel, scale in zip(panels, scales, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            if row["guidance_scale"] == scale:
                name = f"{row['solver']}, {row['schedule']}"
                lines.setdefault(name, []).append((row["network_passes"], row["error"]))
        for name, points in lines.items():
            panel.loglog(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=name)
        panel.set(title=f"guidance {scale:g}", xlabel="network passes of an image")
        panel.set_xticks(ticks := [20, 30, 40, 60, 100], [f"{tick}" for tick in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("error to the converged latents")
    panels[0].legend(fontsize=7)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


@absl_command()
def main():
    folder = Path(OUT.value)
    check_writable(folder, folder=True)
    pipe, _ = model_flags.load(MODEL.value)
    inputs, rows = make_inputs(pipe), []
    for scale in map(float, SCALES.value):
        solution = converged(pipe, inputs, scale, folder)
        for options in GRID:
            sampler = Sampler(**options, guidance_scale=scale)
            rows.append(measure(pipe, inputs, sampler, solution))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    write_text(folder / "result.json", json.dumps(rows, indent=1) + "\n")
    write_text(folder / "result.md", table(rows))
    write_bytes(folder / "result.png", plot(rows))
    print(f"written: {folder / 'result.json'}, result.md, result.png")
