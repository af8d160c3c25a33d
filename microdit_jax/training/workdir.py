"""A run's folder: one job's alone, with the configuration on record and what changed in it."""

import json
import shutil
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from microdit_jax.checkpoints.run import write_run_metadata
from microdit_jax.errors import visible
from microdit_jax.files import disk_errors
from microdit_jax.training.data import RunData


def begin_workdir(
    config: ConfigDict,
    workdir: Path,
    data: RunData,
    networks: dict[str, Any],
    resumed: dict[str, Any] | None,
) -> None:
    """Writes config.json and the codec that the data made; prints what changed since a resume.

    Args:
      networks: what describes network, noise levels and towers in config.json.
      resumed: what was saved beside the state that the run resumes from, None at a stage's start.
    """
    with disk_errors(workdir / "config.json"):
        workdir.mkdir(parents=True, exist_ok=True)
        if data.codec is not None:
            shutil.copytree(data.codec, workdir / "vae", dirs_exist_ok=True)
        about = {
            "has_ema": config.ema.enabled,
            "attribution": data.attribution,
            "config": config.to_dict(),
        }
        write_run_metadata(workdir, networks | about)
    if resumed is not None:
        for change in changes(resumed["config"], config.to_dict()):
            since = f"{workdir}: since step {resumed['step']} the config changed: {change}"
            print(visible(since))


def changes(old: Any, new: Any, name: str = "") -> list[str]:
    """Lists the values that differ between two configurations, one of them read from JSON."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            change
            for key in keys
            for change in changes(old.get(key), new.get(key), f"{name}.{key}".strip("."))
        ]
    # JSON has no tuples.
    same = json.loads(json.dumps(old)) == json.loads(json.dumps(new))
    return [] if same else [f"{name} {old!r} -> {new!r}"]
