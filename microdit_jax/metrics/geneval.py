"""GenEval (Ghosh et al. 2023, arXiv:2310.11513): its prompts, its folders, and its scores.

The benchmark asks for four images of each of 553 prompts. Its own detector decides which are
correct; it needs Python 3.8 or 3.9 and old libraries (docs/evaluation.md has a container for it).
This module turns the detector's answers into the six scores and their mean.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from microdit_jax.errors import UserError
from microdit_jax.files import parse_json, read_bytes, write_text

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SAMPLES = 4  # images of each prompt
_RESULT_KEYS = ("tag", "correct", "metadata")


class Scores(NamedTuple):
    """Shares of correct images.

    Attributes:
      tasks: by task in TASKS' order, without those that have no image.
      overall: the mean over tasks, which the benchmark's tables give.
      images, prompts: how many there were.
      correct_images: share of all images.
      correct_prompts: share of prompts with one correct image or more.
    """

    tasks: dict[str, float]
    overall: float
    images: int
    prompts: int
    correct_images: float
    correct_prompts: float


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Reads the benchmark's evaluation_metadata.jsonl; each line has "tag" and "prompt".

    Raises:
      UserError: the file is missing or another one.
    """
    lines = _read_lines(path)
    for number, line in enumerate(lines, 1):
        if not _is_a_task(line) or not str(line.get("prompt") or "").strip():
            raise UserError(
                f"expected lines with a prompt and a tag ({', '.join(TASKS)}) in {path}, found "
                f"line {number}: {json.dumps(line)[:120]}; give evaluation_metadata.jsonl"
            )
    return lines


def write_metadata(folder: Path, prompts: Sequence[dict[str, Any]]) -> None:
    """Writes NNNNN/metadata.jsonl for each prompt, as the detector expects.

    Raises:
      UserError: the folder was made for other prompts.
    """
    for number, prompt in enumerate(prompts):
        path, text = folder / f"{number:05d}" / "metadata.jsonl", json.dumps(prompt)
        if not path.exists():
            write_text(path, text)
        elif path.read_text() != text:
            raise UserError(
                f"expected {path} to hold {text}, found another prompt; choose another folder"
            )
    extra = folder / f"{len(prompts):05d}"
    if extra.exists():
        raise UserError(
            f"expected {len(prompts)} prompts in {folder}, found more ({extra.name}); choose "
            "another folder"
        )


def image_path(folder: Path, index: int) -> Path:
    """Returns the path of the index-th image, each prompt being sampled SAMPLES times in a row."""
    prompt, sample = divmod(index, SAMPLES)
    return folder / f"{prompt:05d}" / "samples" / f"{sample:04d}.png"


def scores(path: Path) -> Scores:
    """Computes the benchmark's scores from the results.jsonl that its evaluate_images.py writes.

    Raises:
      UserError: the file is missing or another one, or names a task the benchmark does not have.
    """
    lines = _read_lines(path)
    for number, line in enumerate(lines, 1):
        known = _is_a_task(line) and isinstance(line.get("metadata"), str)
        if not known or line.get("correct") not in (True, False):
            raise UserError(
                f"expected lines with {', '.join(_RESULT_KEYS)} in {path}, found line {number}: "
                f"{json.dumps(line)[:120]}; give the detector's results.jsonl"
            )
    by_task = {task: [bool(x["correct"]) for x in lines if x["tag"] == task] for task in TASKS}
    tasks = {task: sum(right) / len(right) for task, right in by_task.items() if right}
    by_prompt: dict[str, bool] = {}
    for line in lines:
        by_prompt[line["metadata"]] = by_prompt.get(line["metadata"], False) or line["correct"]
    return Scores(
        tasks,
        sum(tasks.values()) / len(tasks),
        len(lines),
        len(by_prompt),
        sum(bool(line["correct"]) for line in lines) / len(lines),
        sum(map(bool, by_prompt.values())) / len(by_prompt),
    )


def _is_a_task(line: dict[str, Any]) -> bool:
    return isinstance(line.get("tag"), str) and line["tag"] in TASKS


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = [parse_json(line) for line in read_bytes(path).splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"expected a file of JSON lines at {path}, found {error}") from error
    if not lines or not all(isinstance(line, dict) for line in lines):
        raise UserError(f"expected JSON objects, one a line, in {path}, found none or others")
    return lines
