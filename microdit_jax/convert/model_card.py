"""Model cards in Markdown, filled in with what a model of ours knows of itself.

They name no path of the machine that made them. What only a person knows is left to them, in
comments that readers of the card do not see.
"""

import contextlib
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import jax

from microdit_jax.checkpoints.model_folder import is_model, read_metadata
from microdit_jax.checkpoints.restore import good_step
from microdit_jax.checkpoints.run import is_run, read_run_metadata
from microdit_jax.convert.kinds import get_kind
from microdit_jax.convert.shipped import find_shipped, is_shipped
from microdit_jax.errors import UserError, visible
from microdit_jax.files import parse_json, read_bytes
from microdit_jax.models import dit
from microdit_jax.models.lora import Adapted

CARD = """---
library_name: microdit_jax
pipeline_tag: text-to-image
tags: [microdit, text-to-image, diffusion, jax, flax]
{license}---

# {title}

A MicroDiT, a text-to-image diffusion transformer ([paper](https://arxiv.org/abs/2407.15811)), of {parameters:,} parameters.
{image}
<!-- What are the images like that it makes, and what is it for? -->

| | |
|---|---|
{rows}

## Use it
{use}

## Data and limits
{data}
<!-- Which images and captions was it trained on, and who may use them? What does it get wrong? -->

The method and the reference implementation are Sony Research's
([micro_diffusion](https://github.com/SonyResearch/micro_diffusion)); trained or converted with microdit_jax.
"""  # noqa: E501  (a paragraph)
ADAPTERS = """`{model}` holds pairs of matrices in PEFT's names, to be added to the network named above: W + alpha / rank · B A
(`lora_B` times `lora_A`)."""  # noqa: E501
TO_DO = "<!--"  # begins what is left to the card's author


class About(NamedTuple):
    """A network as its card describes it.

    Attributes:
      config: its DiTConfig.
      weights: which they are, in words.
      run: config.json of its training run; {} for a converted one.
      adapted: the network that a run's adapters belong to; None for whole networks.
      codec: folder of the run's own image codec, if it has one.
      heldout: last held-out losses, "right" and "shuffled"; {} if none were measured.
    """

    config: dit.DiTConfig
    weights: str
    run: dict[str, Any]
    adapted: Adapted | None = None
    codec: Path | None = None
    heldout: dict[str, float] = {}


def describe_model(path: Path, weights: str | None = None) -> About:
    """Reads what a card says of a model folder, a training run or the model in the package.

    Args:
      weights: "model" for a run's raw weights; None takes their average if there is one.
    Raises:
      UserError: nothing usable there, or a few-step student or other noise levels, which a file of
        weights cannot tell.
    """
    path = find_shipped(path)
    to_config = get_kind("dit").config_from_dict
    if not is_run(path) and not is_shipped(path):
        about = read_metadata(path) if is_model(path) else {}
        if about.get("kind") != "dit":
            raise UserError(
                f"expected a training run or a converted network at {visible(path)}, found "
                "something else; convert it first: python -m convert --help"
            )
        source = about.get("source", {})
        name, checksum = source.get("file", "another file"), source.get("sha256", "unknown")
        said = f"converted from `{visible(name, 100)}`, sha256 `{visible(checksum, 64)}`"
        return About(to_config(about["dit"]), said, {})
    run = read_run_metadata(path, "dit", "edm", "has_ema", "vae", "text_encoder", "config.data")
    if run.get("student"):
        raise UserError(
            f"expected a network that samples by itself at {visible(path)}, found a few-step "
            "student, which needs its run's settings; share the run's folder"
        )
    ema = run["has_ema"] and weights != "model"
    which = "moving average of the weights" if ema else "weights as trained"
    step = "" if is_shipped(path) else f" at step {good_step(path)[0]:,}"
    codec = path / "vae" if (path / "vae" / "codec.json").is_file() else None
    heldout = _heldout(path / "metrics.jsonl").get("ema" if ema else "raw", {})
    adapted = Adapted.from_dict(run.get("adapted"), f"{path}/config.json")
    return About(to_config(run["dit"]), which + step, run, adapted, codec, heldout)


def model_card(
    about: About,
    file: str,
    *,
    adapters: bool = False,
    repository: str = "",
    license: str = "",
    image: str = "",
) -> str:
    """Returns a model card.

    Args:
      file: name of the file, or folder, with the weights.
      adapters: the file holds a run's adapters alone.
      repository: OWNER/NAME on the hub, from which a reader fetches the files.
      license: identifier as the hub has it; "" leaves it to the card's author.
      image: name of a sheet of samples beside the card.
    """
    sizes = jax.tree.leaves(dit.abstract_params(about.config))
    folder = repository.rpartition("/")[2]
    at = f"{folder}/" if folder else ""
    fetch = f"hf download {repository} --local-dir {shlex.quote(folder)}\n" if repository else ""
    model = f"{at}{file}"
    if adapters:
        use = f"{_code(fetch)}{ADAPTERS.format(model=model)}"
    else:
        use = _code(f"{fetch}{_sampling(about, model, at)}\n").rstrip()
    rows = [("weights", f"`{file}`: {about.weights}"), *_rows(about)]
    return CARD.format(
        title=folder or Path(file).stem,
        parameters=sum(leaf.size for leaf in sizes),
        license=f"license: {license}\n" if license else "",
        image=f"\n![Samples]({image})\n" if image else "",
        rows="\n".join(f"| {name} | {value.replace('|', ' ')} |" for name, value in rows),
        use=use,
        data=about.run.get("attribution", ""),
    )


def _code(command: str) -> str:
    return f"```bash\n{command}```\n" if command else ""


def _rows(about: About) -> list[tuple[str, str]]:
    """Returns the rows of a card's table, each a name and what there is to say."""
    rows = [("network", get_kind("dit").describe(about.config))]
    if about.run:
        data, train = about.run["config"]["data"], about.run["config"].get("train", {})
        rows += [
            ("resolution", f"{data.get('resolution', '?')} px"),
            ("text encoder", f"`{visible(about.run['text_encoder'], 200)}`"),
            ("image codec", f"`{visible(about.run['vae'], 200)}`"),
            ("batch", f"{train.get('batch_size', '?')} images"),
        ]
    if about.adapted is not None:
        lora, base = about.adapted.lora, _public(about.adapted.base, "a network of its author's")
        checksum = visible(about.adapted.weights, 64)
        rows.append(("adapters", f"rank {lora.rank}, alpha {lora.alpha:g}, targets "
                     f"{', '.join(lora.targets)}, of {base}, sha256 `{checksum}`"))  # fmt: skip
    if about.heldout:
        right, shuffled = about.heldout["right"], about.heldout["shuffled"]
        said = f"{right:.3f} with the right captions, {shuffled:.3f} with shuffled ones"
        rows.append(("held-out EDM loss", said))
    return rows


def _sampling(about: About, model: str, at: str) -> str:
    """Returns the command that samples, with the towers that a run was trained with."""
    if not about.run:
        return f'python sample_main.py --model={shlex.quote(model)} --prompt="..."'
    data = about.run["config"]["data"]
    vae = f"{at}vae" if about.codec else _public(data["vae"], "VAE")
    text = _public(data["text_encoder"], "TEXT_ENCODER")
    return (
        f"python sample_main.py --model={shlex.quote(model)} --vae={shlex.quote(vae)} "
        f'--text_encoder={shlex.quote(text)} --prompt="..."'
    )


def _public(name: str, otherwise: str) -> str:
    """Returns a name that others can use, or another text for a path of this machine."""
    local = Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    return otherwise if local and not name.startswith("openclip:") else visible(name, 200)


def _heldout(path: Path) -> dict[str, Any]:
    """Returns the last held-out losses of a run's metrics, {} where there are none."""
    lines = read_bytes(path).split(b"\n") if path.is_file() else []
    for line in reversed(lines):
        if b'"heldout"' in line and line.endswith(b"}"):
            with contextlib.suppress(ValueError):
                found = parse_json(line)["heldout"]
                good = {
                    kind: losses for kind, losses in found.items()
                    if all(isinstance(losses.get(key), float) for key in ("right", "shuffled"))
                }  # fmt: skip
                return good
    return {}
