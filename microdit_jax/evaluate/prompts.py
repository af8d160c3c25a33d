"""Prompts to sample from, read from the files that benchmarks come in."""

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from microdit_jax.data import twemoji
from microdit_jax.errors import UserError
from microdit_jax.files import parse_json, read_bytes
from microdit_jax.metrics import geneval

COLUMNS = ("caption", "prompt", "text")
RUN_SPLITS = ("train", "heldout")


class PromptSet(NamedTuple):
    """Prompts, one for each image.

    metadata: GenEval's lines, one for each geneval.SAMPLES texts; empty for other prompts.
    """

    name: str
    texts: list[str]
    metadata: list[dict[str, Any]]

    @property
    def digest(self) -> str:
        """sha256 of all texts in their order."""
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()


def read_prompts(
    source: str, count: int = 0, *, emoji: Mapping[str, Sequence[str]] = twemoji.DEFAULT_SETS
) -> PromptSet:
    """Reads prompts by name or path.

    Args:
      source: "train" or "heldout", captions of the embedded emoji images; a .csv or .tsv with a
        column caption, prompt or text; COCO's captions_*.json, the first caption of each image;
        GenEval's evaluation_metadata.jsonl; any other file has a prompt on each line.
      count: take this many, spread evenly over all; 0 takes all, and more than there are starts
        over (for train and heldout only: a benchmark samples each of its prompts once).
      emoji: the sets that "train" and "heldout" mean, as `twemoji.sets_of` gives them.
    Raises:
      UserError: no such file, no prompts in it, or fewer than asked for.
    """
    metadata: list[dict[str, Any]] = []
    if source in RUN_SPLITS:
        texts = [image.caption for image in twemoji.images_of_sets(source, emoji)]
        if count > len(texts):
            texts = list(np.resize(np.array(texts), count))
    else:
        path = Path(source)
        try:
            if path.suffix == ".jsonl":
                metadata = geneval.read_prompts(path)
                texts = [str(line["prompt"]) for line in metadata]
            else:
                texts = _read(path)
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"expected prompts in {source}, could not read them ({error!r}); give a .csv with a"
                f" column {', '.join(COLUMNS)}, COCO's captions .json, or a text file"
            ) from error
    if not texts or not all(text.strip() for text in texts):
        raise UserError(f"expected prompts in {source}, found none or an empty one")
    if count > len(texts):
        raise UserError(
            f"expected {count} prompts in {source}, found {len(texts)}; ask for at most these"
        )
    if count:
        chosen = [int(i) for i in np.linspace(0, len(texts) - 1, count)]
        texts = [texts[i] for i in chosen]
        metadata = [metadata[i] for i in chosen] if metadata else []
    if metadata:
        texts = [text for text in texts for _ in range(geneval.SAMPLES)]
    return PromptSet(Path(source).name, [str(text) for text in texts], metadata)


def _read(path: Path) -> list[str]:
    text = read_bytes(path).decode()
    if path.suffix in (".csv", ".tsv"):
        rows = csv.DictReader(text.splitlines(), delimiter="\t" if path.suffix == ".tsv" else ",")
        column = next((name for name in COLUMNS if name in (rows.fieldnames or ())), None)
        if column is None:
            raise UserError(
                f"expected a column {' or '.join(COLUMNS)} in {path}, found "
                f"{', '.join(rows.fieldnames or ()) or 'none'}"
            )
        return [row[column] or "" for row in rows]  # None where a row is too short
    if path.suffix == ".json":
        first: dict[int, str] = {}
        for annotation in sorted(parse_json(text)["annotations"], key=lambda a: a["id"]):
            first.setdefault(annotation["image_id"], str(annotation["caption"] or ""))
        return [first[image] for image in sorted(first)]
    return [line for line in text.splitlines() if line.strip()]
