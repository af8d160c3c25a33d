"""Held-out loss and `frechet_small` of a run's averages by their length, beside its own weights.

  python train_main.py --config=configs/demo.py --workdir=out/demo \\
    --config.pretrain.ema.snapshot_every=25 --config.finetune.ema.snapshot_every=50
  python -m benchmarks.ema_lengths --run=out/demo/finetune --num_images=1000 --out=out/ema_lengths

The loss is that of the run's own evaluations, with as many noise samples. Images are sampled with
its guidance scale and solver `ab3`, from its training captions, and compared with their images.
Results go to lengths.json as soon as they are there, with a table and a plot beside it in the end.
The same command again goes on from them.
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command("benchmarks.ema_lengths")

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from microdit_jax import create, sharding
from microdit_jax.assets import load
from microdit_jax.assets.load import Model
from microdit_jax.checkpoints.run import read_run_metadata
from microdit_jax.commands.cli import absl_command
from microdit_jax.data import twemoji
from microdit_jax.errors import UserError
from microdit_jax.evaluate.prompts import read_prompts
from microdit_jax.files import check_writable, read_json, write_bytes, write_text
from microdit_jax.models.dit import DiT
from microdit_jax.noise import initial_noise
from microdit_jax.sampling.settings import Sampler
from microdit_jax.training import defaults
from microdit_jax.training.data import load_data
from microdit_jax.training.evaluators.heldout_loss import HeldoutLoss
from microdit_jax.training.evaluators.samples import Scorer

RUN = flags.DEFINE_string("run", None, "Folder of a run with ema.snapshot_every.")
LENGTHS = flags.DEFINE_list(
    "lengths", ["0.03", "0.04", "0.05", "0.06", "0.075", "0.1", "0.125", "0.15", "0.2"],
    "Lengths (sigma_rel) to make.",
)  # fmt: skip
IMAGES = flags.DEFINE_integer("num_images", 0, "For frechet_small; 0: the loss alone.")
SEEDS = flags.DEFINE_list("seeds", ["2024"], "Of the initial noise, one or several.")
BATCH = flags.DEFINE_integer("batch_size", 50, "Images sampled at a time.", lower_bound=1)
OUT = flags.DEFINE_string("out", "out/ema_lengths", "Folder for everything.")

Row = dict[str, Any]  # "weights": raw, ema or a length; "loss", "ratio"; "frechet_small" by seed


def recorded_config(run: str) -> ConfigDict:
    """Returns the configuration that a run has on record."""
    config = defaults.base()
    with config.unlocked():
        config.update(read_run_metadata(run, "config")["config"])
    return config


def make_loss(config: ConfigDict, model: Model) -> Callable[[Any], dict[str, Any]]:
    """Returns the held-out loss that the run itself measures."""
    mesh, settings = sharding.make_mesh(), config.eval
    return HeldoutLoss(
        DiT(model.config),
        model.edm,
        mesh,
        load_data(config, mesh).heldout,
        num_images=settings.num_images,
        batch_size=settings.batch_size,
        noise_samples=settings.draws,
    )


class Quality:
    """Samples from the training captions, and their distance to the images of these."""

    def __init__(self, config: ConfigDict, model: Model, folder: Path):
        sets = twemoji.sets_of(config.data)
        self._pipe = create.from_model(model)
        self._captions = self._pipe.encode(read_prompts("train", IMAGES.value, emoji=sets).texts)
        self._sampler = Sampler(solver="ab3", guidance_scale=model.guidance_scale or 1.0)
        self._scorer = Scorer(
            "train", folder / "references", resolution=config.data.resolution, emoji=sets
        )

    def __call__(self, params: Any) -> list[float]:
        """Returns the distance for each seed."""
        pipe, found = dataclasses.replace(self._pipe, params=params), []
        config, options = pipe.model.config, dataclasses.asdict(self._sampler)
        shape = config.input_size, config.input_size, config.in_channels
        for seed in map(int, SEEDS.value):
            noise = np.asarray(initial_noise("jax", seed, len(self._captions), *shape))
            latents = pipe.denoise(self._captions, noise, batch_size=BATCH.value, **options)
            found.append(float(self._scorer(pipe, latents)["frechet_small"]))
        return found


def options_of(weights: str) -> dict[str, Any]:
    """Returns what `load_model` takes for weights by their name in a row."""
    known = {"raw": {"ema": False}, "ema": {}}
    return known[weights] if weights in known else {"ema_length": float(weights)}


def table(rows: list[Row]) -> str:
    """Returns the rows as Markdown."""
    lines = ["| weights | loss, right captions | ratio | `frechet_small` |", "|---|---|---|---|"]
    for row in rows:
        distances = row["frechet_small"]
        each = ", ".join(f"{value:.4f}" for value in distances) or "-"
        lines.append(f"| {row['weights']} | {row['loss']:.4f} | {row['ratio']:.4f} | {each} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[Row]) -> bytes:
    """Draws both figures over the length, and those of the run's own weights as lines; a PNG."""
    figures = {"loss": "held-out loss, right captions"}
    if all(row["frechet_small"] for row in rows):
        figures["frechet_small"] = "frechet_small, mean of the seeds"
    figure = Figure(figsize=(5 * len(figures), 3.6), layout="constrained", dpi=110)
    panels = figure.subplots(1, len(figures), squeeze=False)[0]
    for panel, (name, title) in zip(panels, figures.items(), strict=True):
        values = {row["weights"]: float(np.mean(row[name])) for row in rows}
        points = sorted((float(w), v) for w, v in values.items() if w not in ("raw", "ema"))
        panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label="made afterwards")
        for weights, style in (("ema", "--"), ("raw", ":")):
            if weights in values:
                panel.axhline(
                    values[weights], ls=style, color="gray", label=f"{weights} of the run"
                )
        panel.set(xlabel="length of the average (sigma_rel)", ylabel=title, xscale="log")
        panel.set_xticks(ticks := [0.03, 0.05, 0.1, 0.2], [f"{tick:g}" for tick in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def kept_rows(path: Path, about: dict[str, Any]) -> list[Row]:
    """Returns the results that are there; raises UserError for those of another run or seeds."""
    if not path.exists():
        return []
    kept = read_json(path)
    rows = kept.pop("results")
    if kept != about:
        raise UserError(f"expected results of {about} in {path}, found {kept}; give another --out")
    return rows


@absl_command(required=("run",))
def main():
    folder = Path(OUT.value)
    check_writable(folder, folder=True)
    assert RUN.value is not None  # absl_command asks for it
    about = {"run": RUN.value, "num_images": IMAGES.value, "seeds": SEEDS.value}
    path, config = folder / "lengths.json", recorded_config(RUN.value)
    rows = kept_rows(path, about)
    own = ["raw", "ema"] if config.ema.enabled else ["raw"]
    loss, quality = None, None
    for weights in (*own, *(f"{float(length):g}" for length in LENGTHS.value)):
        if any(row["weights"] == weights for row in rows):
            continue
        model = load.load_model(RUN.value, mesh=sharding.make_mesh(), **options_of(weights))
        loss = loss or make_loss(config, model)
        if IMAGES.value:
            quality = quality or Quality(config, model, folder)
        found = loss(model.params)
        row = {"weights": weights, "loss": found["right"], "ratio": found["ratio"]}
        row |= {"by_sigma": found["by_sigma"]}
        row |= {"frechet_small": quality(model.params) if quality else []}
        rows.append(row)
        print(table([row]).splitlines()[-1], flush=True)
        write_text(path, json.dumps(about | {"results": rows}, indent=1) + "\n")
    write_text(path.with_suffix(".md"), table(rows))
    write_bytes(path.with_suffix(".png"), plot(rows))
    print(f"written: {path}, {path.stem}.md, {path.stem}.png")
