"""Rules for the values of a run configuration, which `training.config.check` applies."""

import math
import re
from collections.abc import Iterator, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from microdit_jax.data import twemoji
from microdit_jax.errors import UserError
from microdit_jax.training import defaults

# Where a dataset's records come from, as `training.data` opens them
SOURCES = ("latents", *twemoji.SETS)
OPTIMIZERS = ("adamw", "muon")
GRADIENT_DTYPES = ("float32", "bfloat16")
DATASET_KEYS = {"source", "folder", "weight"}
PATCH_PCA = r"patch_pca:patch=(\d+),channels=(\d+),resolution=(\d+)"


class Range(NamedTuple):
    """An interval of finite numbers; `above` and `below` leave out its ends."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    below: bool = False

    def holds(self, value: Any) -> bool:
        """True for a number in the interval; neither NaN nor an infinity is in any."""
        low = value > self.least if self.above else value >= self.least
        high = value < self.most if self.below else value <= self.most
        return math.isfinite(value) and low and high

    def __str__(self) -> str:
        words = []
        if self.least > -math.inf:
            words.append(f"{'above' if self.above else 'at least'} {self.least:g}")
        if self.most < math.inf:
            words.append(f"{'below' if self.below else 'at most'} {self.most:.10g}")
        return " and ".join(words) or "a finite number"


COUNT, COUNT_OR_NONE = Range(1), Range(0)
POSITIVE, NOT_NEGATIVE, FINITE = Range(0, above=True), Range(0), Range()

RANGES = {
    "seed": Range(0, 2**32 - 1),
    "distill.guidance_scale": NOT_NEGATIVE,
    "distill.trajectory_steps": COUNT,
    "lora.rank": COUNT_OR_NONE,
    "lora.alpha": POSITIVE,
    "edm.P_mean": FINITE,
    "edm.P_std": POSITIVE,
    "edm.sigma_data": POSITIVE,
    "data.resolution": COUNT,
    "data.heldout_share": Range(0, 1, above=True, below=True),
    "data.caption_drop": Range(0, 1),
    "data.threads": COUNT_OR_NONE,
    "data.cache_bytes": COUNT,
    "optim.learning_rate": NOT_NEGATIVE,
    "optim.warmup_steps": COUNT_OR_NONE,
    "optim.decay_steps": COUNT_OR_NONE,
    "optim.final_ratio": NOT_NEGATIVE,
    "optim.linear_steps": COUNT_OR_NONE,
    "optim.weight_decay": NOT_NEGATIVE,
    "optim.expert_multiplier": NOT_NEGATIVE,
    "ema.smoothing": Range(0, 1, below=True),
    "ema.start_step": COUNT_OR_NONE,
    "ema.snapshot_every": COUNT_OR_NONE,
    "train.steps": COUNT,
    "train.batch_size": COUNT,
    "train.micro_batch_size": COUNT_OR_NONE,
    "train.mask_ratio": Range(0, 1, below=True),
    "train.log_every": COUNT,
    "train.eval_every": COUNT,
    "train.checkpoint_every": COUNT,
    "train.keep_last": COUNT,
    "train.keep_every": COUNT_OR_NONE,
    "train.max_skipped": COUNT_OR_NONE,
    "train.replica_check_every": COUNT_OR_NONE,
    "eval.num_images": COUNT,
    "eval.batch_size": COUNT,
    "eval.draws": COUNT,
    "eval.num_samples": COUNT_OR_NONE,
    "eval.score_images": COUNT_OR_NONE,
    "eval.guidance_scale": NOT_NEGATIVE,
    "eval.num_inference_steps": COUNT,
    "profile.start": COUNT,
    "profile.steps": COUNT_OR_NONE,
}


# ------------------------------------------------------------------ keys and types
def check_keys(config: ConfigDict) -> None:
    """Checks that all keys of `defaults.base` are there, no others, each of its type.

    Raises:
      UserError: a key is missing, unknown, or holds a value of another type.
    """
    expected, found = dict(_leaves(defaults.base())), dict(_leaves(config))
    if missing := sorted(expected.keys() - found.keys()):
        raise UserError(
            f"expected the config key {missing[0]}, found none; start from "
            "microdit_jax.training.defaults.base()"
        )
    if unknown := sorted(found.keys() - expected.keys()):
        raise UserError(
            f"unknown config key {unknown[0]}; microdit_jax/training/defaults.py has all"
        )
    for name, default in expected.items():
        kind, holds = _type_of(default)
        if not holds(found[name]):
            raise UserError(f"{name} must be {kind}, found {found[name]!r}")


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by path; model.options, whose keys are DiTConfig's, counts as one value."""
    for name in config:
        value = config[name]
        if isinstance(value, ConfigDict) and prefix + name != "model.options":
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _type_of(default: Any) -> tuple[str, Any]:
    """The name of a default's type, and a test for values of it."""
    if isinstance(default, bool):
        return "True or False", lambda value: isinstance(value, bool)
    if isinstance(default, int):
        return "an integer", lambda v: isinstance(v, Integral) and not isinstance(v, bool)
    if isinstance(default, float):
        return "a number", lambda v: isinstance(v, Real) and not isinstance(v, bool)
    if isinstance(default, str):
        return "a string", lambda value: isinstance(value, str)
    if isinstance(default, tuple):
        return "a tuple", lambda value: isinstance(value, tuple | list)
    return "a dictionary", lambda value: isinstance(value, Mapping | ConfigDict)


# ------------------------------------------------------------------ values
def check_ranges(config: ConfigDict) -> None:
    """Raises UserError for a number out of its range, NaN and infinities among them, or a name."""
    for name, allowed in RANGES.items():
        part, _, key = name.rpartition(".")
        value = config[part][key] if part else config[key]
        if not allowed.holds(value):
            finite = "" if math.isfinite(value) or allowed == FINITE else "finite and "
            raise UserError(f"{name} must be {finite}{allowed}, found {value}")
    if config.train.gradient_dtype not in GRADIENT_DTYPES:
        raise UserError(
            f"train.gradient_dtype must be one of {', '.join(GRADIENT_DTYPES)}, found "
            f"{config.train.gradient_dtype!r}"
        )
    if config.optim.name not in OPTIMIZERS:
        raise UserError(
            f"optim.name must be one of {', '.join(OPTIMIZERS)}, found {config.optim.name!r}"
        )
    # Infinity is no limit at all, which may be wanted.
    if not config.optim.clip_norm > 0:
        raise UserError(f"optim.clip_norm must be above 0, found {config.optim.clip_norm}")


def check_datasets(data: ConfigDict) -> None:
    """Checks the entries of data.datasets and data.heldout, and what their sources ask for.

    Raises:
      UserError: no dataset; keys, a source, a folder or a weight that cannot be; captions or a VAE
        that the source does not have.
    """
    if data.folder:
        if data.datasets or data.heldout.source:
            raise UserError(
                "data.folder stands in place of data.datasets and data.heldout, found it beside "
                "them; give the one or the others"
            )
    elif not data.datasets:
        raise UserError(
            "data.datasets must name at least one dataset, found none; --config.data.folder takes "
            "one folder that python -m microdit_jax.prepare wrote"
        )
    for entry in data.datasets:
        if not hasattr(entry, "keys") or set(entry.keys()) != DATASET_KEYS:
            raise UserError(
                "each of data.datasets must be a dictionary of "
                f"{', '.join(sorted(DATASET_KEYS))}, found {entry}"
            )
        weight = entry["weight"]
        number = isinstance(weight, Real) and not isinstance(weight, bool)
        if not number or not POSITIVE.holds(weight):
            raise UserError(
                f"a dataset's weight must be a finite number above 0, found {weight!r} for "
                f"{entry['folder']}; leave a dataset out rather than weighting it 0"
            )
    if data.captions not in ("embeddings", "tokens"):
        raise UserError(f"data.captions must be one of embeddings, tokens, found {data.captions!r}")
    for entry in () if data.folder else (*data.datasets, data.heldout):
        _check_source(data, entry["source"], entry["folder"])


def _check_source(data: ConfigDict, source: Any, folder: Any) -> None:
    if source not in SOURCES:
        raise UserError(f"a dataset's source must be one of {', '.join(SOURCES)}, found {source!r}")
    if not isinstance(folder, str) or not folder:
        raise UserError(f"a dataset's folder must be a path or a URL, found {folder!r}")
    if source == "latents":
        return
    if re.fullmatch(PATCH_PCA, data.vae) is None:
        raise UserError(
            f"data.vae for the source {source} must be like "
            f"patch_pca:patch=4,channels=8,resolution=32, found {data.vae!r}"
        )
    if data.captions != "embeddings":
        raise UserError(
            f"the source {source} stores embeddings, found data.captions={data.captions!r}; use "
            "data.captions=embeddings"
        )


def check_prompts(settings: ConfigDict) -> None:
    """Raises UserError for eval.prompts that are empty, or fewer than the grid has samples."""
    prompts = settings.prompts
    for prompt in prompts:
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"eval.prompts must be texts that are not empty, found {prompt!r}")
    if prompts and settings.num_samples > len(prompts):
        raise UserError(
            f"eval.num_samples must be at most the {len(prompts)} eval.prompts, found "
            f"{settings.num_samples}; give more prompts, or none to sample held-out captions"
        )
