"""Samplers by their network passes: error to the converged solution, or `frechet_small`.

  python -m benchmarks.sampling --num_prompts=32 --guidance_scale=3,5 --out=out/sampling
  python -m benchmarks.sampling --measure=frechet_small --num_prompts=2000 --guidance_scale=3 \\
    --seed=2024,2025,2026 --out=out/sampling

The converged solution of a (prompt, noise, guidance scale) is Heun's of 200 steps. An error is the
relative L2 distance of the latents to it, over all images; the median is that of the images one by
one, which a few images that ended elsewhere do not move. `frechet_small` is the distance of the
images to the embedded emoji images. Prompts are captions of these, spread evenly. Results go to
MEASURE.json as soon as they are there, with a table and a plot beside it in the end. The same
command again goes on from them.
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command("benchmarks.sampling")

import dataclasses
import io
import itertools
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
from microdit_jax.errors import UserError
from microdit_jax.evaluate.prompts import read_prompts
from microdit_jax.files import check_writable, read_json, write_bytes, write_text
from microdit_jax.noise import initial_noise
from microdit_jax.sampling.pipeline import LatentDiffusion
from microdit_jax.sampling.settings import Sampler, network_passes
from microdit_jax.training.evaluators.samples import Scorer

MODEL = flags.DEFINE_string("model", hub.INSTANT, "A network, as for sample_main.py.")
MEASURE = flags.DEFINE_enum("measure", "error", ["error", "frechet_small"], "What to measure.")
PROMPTS = flags.DEFINE_integer("num_prompts", 32, "Captions, an image each.", lower_bound=1)
SCALES = flags.DEFINE_list("guidance_scale", ["3", "5"], "Guidance scales.")
SEEDS = flags.DEFINE_list("seed", ["1"], "Of the initial noise, one or several.")
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
QUALITY_GRID = (
    {},
    {"solver": "ab3", "num_inference_steps": 14, "guidance": "interval"},
    {"solver": "ab3"},
    {"solver": "ab3", "num_inference_steps": 10, "guidance": "interval"},
    {"solver": "sab2", "num_inference_steps": 6, "guidance": "interval"},
    {"solver": "sab2", "num_inference_steps": 12},
    {"num_inference_steps": 13},
)
RESOLUTION = 32  # pixels of the emoji images that samples are compared with


Row = dict[str, Any]  # a sampler's settings, and what was measured


class Bench:
    """A network with embedded captions, and the noise of any seed that all samplers start from."""

    def __init__(self, pipe: LatentDiffusion, folder: Path):
        self.pipe, self._folder = pipe, folder
        self._captions = pipe.encode(read_prompts("train", PROMPTS.value).texts)
        self._scorer = None
        if MEASURE.value == "frechet_small":
            self._scorer = Scorer("train", folder / "references", resolution=RESOLUTION)

    def sampled(self, sampler: Sampler, seed: int) -> Float[np.ndarray, "n *z"]:
        """Samples the latents of all captions."""
        config = self.pipe.model.config
        shape = config.input_size, config.input_size, config.in_channels
        noise = np.asarray(initial_noise("jax", seed, len(self._captions), *shape))
        options = dataclasses.asdict(sampler)
        return self.pipe.denoise(self._captions, noise, batch_size=BATCH.value, **options)

    def converged(self, scale: float, seed: int) -> Float[np.ndarray, "n *z"]:
        """Returns the converged solution, from its file if it is there."""
        path = self._folder / f"converged_{PROMPTS.value}_{seed}_{scale:g}.npy"
        if not path.exists():
            sampler = Sampler(num_inference_steps=CONVERGED, guidance_scale=scale)
            file = io.BytesIO()
            np.save(file, self.sampled(sampler, seed))
            write_bytes(path, file.getvalue())
        return np.load(path)

    def measure(self, sampler: Sampler, seed: int) -> Row:
        """Samples once, and compares with the converged solution or with real images."""
        plan, start = sampler.plan(self.pipe.edm), time.perf_counter()
        found = self.sampled(sampler, seed)
        seconds = time.perf_counter() - start
        if self._scorer is not None:
            compared = {"frechet_small": float(self._scorer(self.pipe, found)["frechet_small"])}
        else:
            compared = distances(found, self.converged(sampler.guidance_scale, seed))
        return {
            **dataclasses.asdict(sampler),
            "seed": seed,
            "evaluations": len(plan),
            "network_passes": network_passes(plan),
            "seconds_an_image": seconds / len(found),
            **compared,
        }


def distances(
    found: Float[np.ndarray, "n *z"], solution: Float[np.ndarray, "n *z"]
) -> dict[str, float]:
    """Compares latents with the converged ones."""
    square = np.square(found - solution).reshape(len(found), -1).sum(axis=1)
    size = np.square(solution).reshape(len(found), -1).sum(axis=1)
    error = np.sqrt(square.sum() / size.sum())
    return {"error": float(error), "median": float(np.median(np.sqrt(square / size)))}


def name_of(row: Row) -> str:
    """Returns a sampler's name but for its number of steps."""
    low_high = row["guidance_interval"]
    inside = "" if low_high is None else ", guidance in ({:g}, {:g}]".format(*low_high)
    return f"{row['solver']}, {row['schedule']}{inside}"


def key_of(row: Row) -> tuple[float, str, int]:
    """Returns what tells the samplers of this bench apart."""
    return row["guidance_scale"], name_of(row), row["num_inference_steps"]


def by_sampler(rows: list[Row]) -> list[list[Row]]:
    """Puts the seeds of each sampler and guidance scale together, in the order of the first."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(key_of(row), []).append(row)
    return list(groups.values())


def table(rows: list[Row]) -> str:
    """Returns a Markdown table: each sampler's mean over the seeds, and each seed's value."""
    extra = " median |" if MEASURE.value == "error" else ""
    lines = [f"| guidance | sampler | evaluations | passes | s/image | mean |{extra} each seed |"]
    lines.append("|---" * lines[0].count(" |") + "|")
    for group in by_sampler(rows):
        row = group[0]
        seconds, *means = (
            np.mean([row[name] for row in group])
            for name in ("seconds_an_image", MEASURE.value, *(["median"] if extra else []))
        )
        cells = [f"{row['guidance_scale']:g}", name_of(row), row["evaluations"]]
        cells += [row["network_passes"], f"{seconds:.3f}", *(f"{mean:.4f}" for mean in means)]
        cells.append(", ".join(f"{row[MEASURE.value]:.4f}" for row in group))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[Row]) -> bytes:
    """Draws what was measured over network passes, a panel for each guidance scale, as a PNG.

    A point is the mean of the seeds, and its bar goes from the lowest to the highest.
    """
    scales = sorted({row["guidance_scale"] for row in rows})
    figure = Figure(figsize=(5 * len(scales), 4), layout="constrained", dpi=110)
    panels = figure.subplots(1, len(scales), sharey=True, squeeze=False)[0]
    for panel, scale in zip(panels, scales, strict=True):
        lines: dict[str, list[tuple[int, float, float, float]]] = {}
        for group in by_sampler([row for row in rows if row["guidance_scale"] == scale]):
            values = [row[MEASURE.value] for row in group]
            mean = float(np.mean(values))
            point = group[0]["network_passes"], mean, mean - min(values), max(values) - mean
            lines.setdefault(name_of(group[0]), []).append(point)
        for name, points in lines.items():
            x, y, below, above = zip(*sorted(points), strict=True)
            panel.errorbar(x, y, (below, above), marker="o", markersize=3, capsize=2, label=name)
        panel.set(title=f"guidance {scale:g}", xlabel="network passes of an image", xscale="log")
        if MEASURE.value == "error":
            panel.set(yscale="log")
        else:
            panel.set_ylim(bottom=0)
        panel.set_xticks(ticks := [10, 20, 30, 40, 60, 100], [f"{tick}" for tick in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    error = MEASURE.value == "error"
    panels[0].set_ylabel("error to the converged latents" if error else MEASURE.value)
    panels[0].legend(fontsize=7)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def kept_rows(path: Path) -> list[Row]:
    """Returns the results that are there.

    Raises:
      UserError: they are of another model or other captions.
    """
    if not path.exists():
        return []
    kept = read_json(path)
    if kept["model"] != MODEL.value or kept["num_prompts"] != PROMPTS.value:
        raise UserError(
            f"expected results of {MODEL.value} and {PROMPTS.value} captions in {path}, found "
            f"those of {kept['model']} and {kept['num_prompts']}; give another --out"
        )
    return kept["results"]


@absl_command()
def main():
    folder = Path(OUT.value)
    check_writable(folder, folder=True)
    path = folder / f"{MEASURE.value}.json"
    rows = kept_rows(path)
    done = {(*key_of(row), row["seed"]) for row in rows}
    pipe, _ = model_flags.load(MODEL.value)
    bench, grid = Bench(pipe, folder), GRID if MEASURE.value == "error" else QUALITY_GRID
    for scale, options in itertools.product(map(float, SCALES.value), grid):
        sampler = Sampler(**options, guidance_scale=scale)
        for seed in map(int, SEEDS.value):
            if (*key_of(dataclasses.asdict(sampler)), seed) in done:
                continue
            rows.append(bench.measure(sampler, seed))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
            about = {"model": MODEL.value, "num_prompts": PROMPTS.value, "results": rows}
            write_text(path, json.dumps(about, indent=1) + "\n")
    write_text(path.with_suffix(".md"), table(rows))
    write_bytes(path.with_suffix(".png"), plot(rows))
    print(f"written: {path}, {path.stem}.md, {path.stem}.png")
