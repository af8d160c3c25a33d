"""Writes a model of the package, in microdit_jax/assets/instant/, from a finished run.

  python -m tools.ship_instant --run=out/instant/stage2
  python -m tools.ship_instant --run=out/instant2 --name=instant2 --ema_length=0.1
  python -m tools.ship_instant --run=runs/mine --out=mine      (then sample_main.py --model=mine)

The moving average of the weights in bfloat16, and beside it all that sampling needs.
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command(__file__)

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from microdit_jax.assets import hub, instant, load
from microdit_jax.checkpoints import restore, weights
from microdit_jax.checkpoints.run import read_run_metadata
from microdit_jax.commands.parser import Parser
from microdit_jax.convert.dit import config_from_dict
from microdit_jax.convert.formats.safetensors_file import write_safetensors
from microdit_jax.data import twemoji
from microdit_jax.errors import UserError
from microdit_jax.files import checksums, disk_errors, write_json
from microdit_jax.training.metric_writer import read_metrics
from microdit_jax.training.start import source_path
from microdit_jax.trees import flatten

MOST_BYTES = 8_000_000  # of the whole folder
EDITIONS = {"instant": "", "instant2": ", second edition"}  # title of the card, by name
ALLOWED = {"README.md", "config.json", "manifest.json", "vae", "weights.safetensors"}

CARD = """# {title}

A MicroDiT of {parameters:,} parameters that samples emoji of {side} px from a few words. It knows the words of its {captions:,} captions
{known}: try "red apple" or "woman mechanic dark skin tone", not a sentence.{notes}

| | |
|---|---|
| weights | moving average{which} at step {step} of the last stage, bfloat16, {megabytes:.1f} MB with all files; sha256 of each in `manifest.json` |
| data | {captions:,} emoji images and their English names; {heldout} more were held out |
| held-out EDM loss{losses_of} | {right:.3f} with the right captions, {shuffled:.3f} with shuffled ones: {ratio:.2f} of it |
| text | `{text_encoder}`: {vectors} |
| images | `{vae}`: principal components of 4 x 4 pixels, no pretrained VAE |
| seed | {seed} |
| made by | `{command}` |

| stage | px | patches masked | batch | updates |
|---|---|---|---|---|
{stages}

Images and names it was trained on: {attribution}. What it samples is made from them: give the same credit where you show it. The skin tones,
genders and trades in its images are those of the emoji standard.
"""  # noqa: E501  (rows of a table)

# By the beginning of a text encoder's name: what the network knows, and what its vectors are
TEXTS = {
    "table": (
        "and nothing else",
        "a fixed random vector for each of CLIP's tokens, no pretrained tower",
    ),
    "words": (
        "and words that mean much the same",
        "a fixed vector for each word, distilled from all-MiniLM-L6-v2 (Apache-2.0)",
    ),
}


class Stage(NamedTuple):
    """A run in the chain that led to the weights: its images, and its own updates."""

    folder: Path
    resolution: int
    mask_ratio: float
    batch_size: int
    updates: int


def main(arguments: Sequence[str]) -> None:
    parser = Parser("tools.ship_instant", __doc__)
    parser.add_argument("--run", required=True, type=Path, help="the last stage's workdir")
    parser.add_argument(
        "--name", default=hub.INSTANT, choices=hub.INSTANTS, help="its name (default: instant)"
    )
    parser.add_argument("--out", type=Path, help="folder to write (default: the package's)")
    parser.add_argument("--ema_length", type=float, help="of the average (default: the run's own)")
    parser.add_argument("--command", help="how it was trained, for the model card")
    parser.add_argument("--notes", default="", help="what else the model card should say")
    flags = parser.parse_args(arguments)
    out = flags.out or instant.FOLDERS[flags.name]
    trained = f"python train_main.py --config=configs/{flags.name}.py --workdir=out/{flags.name}"
    texts = {"command": flags.command or trained, "notes": flags.notes}
    texts["title"] = "The instant model" + EDITIONS[flags.name]
    ship(flags.run, out, ema_length=flags.ema_length, **texts)
    print(f"{out}: {folder_bytes(out) / 1e6:.2f} MB")


def folder_bytes(folder: Path) -> int:
    """Size in bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def ship(
    run: Path,
    out: Path,
    *,
    command: str,
    notes: str = "",
    title: str = "The instant model",
    ema_length: float | None = None,
) -> None:
    """Writes the folder, which takes its name only once it is complete; an older one is replaced.

    Args:
      run: a training run that keeps an average of its weights and whose data made their codec.
      command, notes, title: of the model card: how it was trained, what else to say, and its name.
      ema_length: of the average, made from the run's snapshots; None: the run's own.
    Raises:
      UserError: not such a run, or no such average; something else at `out`; more than 8 MB.
    """
    metadata = read_run_metadata(run)
    if not metadata["has_ema"] or not (run / "vae").is_dir():
        raise UserError(
            f"expected a run with an average of its weights and a codec of its own in {run}, found "
            "none; train configs/instant.py"
        )
    if out.exists() and not {path.name for path in out.iterdir()} <= ALLOWED:
        raise UserError(f"expected an older shipped model at {out}, found other files; move them")
    abstract = load.abstract_params(config_from_dict(metadata["dit"]))
    params, step = weights.load_run_params(run, abstract, ema=True, ema_length=ema_length)
    arrays = {
        path: np.asarray(array).astype(ml_dtypes.bfloat16)
        for path, array in flatten(params).items()
    }
    partial = out.with_name(f".{out.name}.partial")
    with disk_errors(out, MOST_BYTES):
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(run / "vae", partial / "vae")
        write_safetensors(partial / instant.WEIGHTS, arrays)
        shutil.copy(run / "config.json", partial)
        size = folder_bytes(partial)
        which = "" if ema_length is None else f" of length {ema_length:g}"
        texts = {"command": command, "notes": notes and f"\n\n{notes}", "title": title}
        texts["which"] = which
        texts["losses_of"] = which and " of the run's own average"
        (partial / "README.md").write_text(card(run, metadata, step, arrays, size, texts))
        write_json(partial / instant.MANIFEST, checksums(partial))
        size = folder_bytes(partial)
        if size > MOST_BYTES:
            raise UserError(
                f"expected at most {MOST_BYTES:,} bytes, found {size:,}; train a smaller network"
            )
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)


def card(
    run: Path, metadata: dict, step: int, arrays: dict[str, Any], size: int, texts: dict
) -> str:
    """Returns the model card, from the run's records."""
    losses = last_heldout(run)["ema"]
    data = metadata["config"]["data"]
    known, vectors = TEXTS[metadata["text_encoder"].partition(":")[0]]
    codec = json.loads((run / "vae" / "codec.json").read_text())
    rows = [
        f"| {stage.folder.name} | {stage.resolution} | {stage.mask_ratio:.0%} "
        f"| {stage.batch_size} | {stage.updates} |"
        for stage in chain(run)
    ]
    return CARD.format(
        parameters=sum(array.size for array in arrays.values()),
        side=data["resolution"],
        captions=int(codec["name"].split("images=")[1].split("x")[0]),
        heldout=len(twemoji.images_of_sets("heldout", twemoji.sets_of(data))),
        known=known,
        vectors=vectors,
        step=step,
        megabytes=size / 1e6,
        text_encoder=metadata["text_encoder"],
        vae=metadata["vae"],
        seed=metadata["config"]["seed"],
        stages="\n".join(rows),
        attribution=metadata["attribution"],
        **losses,
        **texts,
    )


def chain(run: Path) -> list[Stage]:
    """Returns the stages that led to a run, in the order they were trained."""
    stages, workdir = [], run
    while workdir is not None:
        config = read_run_metadata(workdir)["config"]
        keys = ("init_from", "init_weights_from")
        full, alone = (source_path(config[key], workdir) for key in keys)
        # Steps count from where the weights began to train; of the full state they go on.
        before = restore.good_step(Path(full))[0] if full else 0
        train = config["train"]
        stages.append(
            Stage(
                workdir, config["data"]["resolution"], train["mask_ratio"], train["batch_size"],
                restore.good_step(workdir)[0] - before,
            )
        )  # fmt: skip
        workdir = Path(full or alone) if full or alone else None
    return stages[::-1]


def last_heldout(run: Path) -> dict:
    """Returns the run's last held-out losses, of the raw weights and of their average."""
    return [line["heldout"] for line in read_metrics(run) if "heldout" in line][-1]
