"""The evaluation of one model, read top to bottom: what is checked, drawn, measured and written."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax

from microdit_jax.assets import load
from microdit_jax.checkpoints import model_folder
from microdit_jax.checkpoints import run as run_checkpoint
from microdit_jax.convert import clip as convert_clip
from microdit_jax.convert import inception as convert_inception
from microdit_jax.errors import UserError
from microdit_jax.evaluate import report
from microdit_jax.evaluate.generation import Settings, draw_set, weights_digest
from microdit_jax.evaluate.prompts import RUN_SPLITS, PromptSet, read_prompts
from microdit_jax.evaluate.reference import crop_to, get_reference
from microdit_jax.evaluate.scores import (
    FEATURE_METRICS,
    INCEPTION_METRICS,
    METRICS,
    feature_scores,
    measure_cosines,
    over_seeds,
)
from microdit_jax.machine import hosts
from microdit_jax.metrics import geneval
from microdit_jax.metrics.clip_score import mean_score
from microdit_jax.metrics.features import (
    FeatureNetwork,
    inception_features,
    on_all_devices,
    small_features,
)
from microdit_jax.metrics.statistics import Reference
from microdit_jax.sampling.pipeline import LatentDiffusion

# Flags that other metrics would ignore, and whose they are
FOR_METRICS = {
    "inception": INCEPTION_METRICS,
    "reference": FEATURE_METRICS,
    "clip": ("clip_score",),
    "geneval_prompts": ("geneval",),
}
PUBLIC_INCEPTION = "6726825d"  # how the sha256 of the public weights starts


class Subject(NamedTuple):
    """What is evaluated, and the name a person gave it by."""

    name: str
    model: load.Model
    pipe: LatentDiffusion


@dataclasses.dataclass(frozen=True)
class Request:
    """What a person asks for; the command's flags."""

    metrics: tuple[str, ...] = ("frechet_small",)
    prompts: str = "train"
    num_images: int = 0
    guidance_scales: tuple[float, ...] = (5.0,)
    seeds: tuple[int, ...] = (2024,)
    num_inference_steps: int = 30
    batch_size: int = 32
    chunk_size: int = 128
    reference: str | None = None
    inception: str | None = None
    resize: str = "clean"
    side: int = 0
    clip: str | None = None
    geneval_prompts: str | None = None
    geneval_results: str | None = None
    keep_images: bool = False

    def __post_init__(self):
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown or not self.metrics:
            raise UserError(
                f"--metrics takes {', '.join(METRICS)}, found {', '.join(unknown) or 'none'}"
            )
        inception = [name for name in self.metrics if name in INCEPTION_METRICS]
        for metrics, flag, hint in (
            (inception, "inception", "or take frechet_small, which needs no download"),
            ([m for m in self.metrics if m == "clip_score"], "clip", "both towers are needed"),
        ):
            if metrics and getattr(self, flag) is None:
                raise UserError(f"--{flag} is needed for {', '.join(metrics)}, found none; {hint}")
        for flag, metrics in FOR_METRICS.items():
            if getattr(self, flag) and not set(metrics) & set(self.metrics):
                raise UserError(
                    f"--{flag} is for --metrics={','.join(metrics)}, found --metrics="
                    f"{','.join(self.metrics)}; ask for one of those, or leave --{flag} out"
                )
        if inception and "frechet_small" in self.metrics:
            raise UserError(f"frechet_small goes without {', '.join(inception)}; ask for one")
        if "geneval" in self.metrics and not (self.geneval_prompts or self.geneval_results):
            raise UserError("geneval needs --geneval_prompts to draw, or --geneval_results")
        sets = len(self.guidance_scales) * len(self.seeds)
        if self.geneval_results and sets != 1:
            raise UserError(
                f"--geneval_results belongs to one guidance scale and one seed, found {sets} sets"
            )
        if not self.guidance_scales or not self.seeds:
            raise UserError("expected a guidance scale and a seed, found none")
        if not all(map(math.isfinite, self.guidance_scales)):
            found = ",".join(map(str, self.guidance_scales))
            raise UserError(f"--guidance_scale takes finite numbers, found {found}")


def evaluate(subject: Subject, asked: Request, out: Path) -> tuple[dict[str, Any], list[Path]]:
    """Draws, measures and writes; the same call again resumes.

    Returns:
      The contents of result.json, and the files written.
    Raises:
      UserError: something is missing or does not fit; see `Request` and draw_set.
    """
    pipe, notes = subject.pipe, []
    # What the pictures are a function of, beside prompts, noise and sampler
    assert pipe.codec is not None
    made_by = {
        "weights": weights_digest(pipe.params),
        "dit": repr(pipe.model.config),
        "vae": pipe.codec.name,
        "text_encoder": pipe.text_encoder.name,
    }
    # What they are measured by
    network, about_network = _network(asked, notes)
    reference, about_reference = _reference(subject, asked, network, out, notes)
    measures, clip_name = _measures(asked, network)
    prompts = read_prompts(asked.prompts, asked.num_images) if measures else None
    geneval_prompts = _geneval_prompts(asked)
    # Pictures and scores
    rows = []
    for scale in asked.guidance_scales:
        by_seed: dict[str, dict[int, float]] = {}
        for seed in asked.seeds:
            settings = Settings(seed, scale, asked.num_inference_steps, asked.batch_size, made_by)
            folder = out / f"guidance_{scale:g}" / f"seed_{seed}"
            if measures:
                found = _score(pipe, prompts, settings, folder, measures, asked, reference)
                for name, value in found.items():
                    by_seed.setdefault(name, {})[seed] = value
            if geneval_prompts:
                images = folder / "geneval" / "images"
                _draw_geneval(pipe, geneval_prompts, settings, images, asked.chunk_size)
                if not asked.geneval_results:
                    notes.append(f"run GenEval's detector over {images}, then --geneval_results")
        scores = {name: over_seeds(values) for name, values in by_seed.items()}
        drawn = prompts or geneval_prompts
        count = len(drawn.texts) if drawn else 0
        rows.append({"guidance_scale": scale, "pictures": count, "scores": scores})
    tasks = None
    if asked.geneval_results:
        tasks = geneval.scores(Path(asked.geneval_results))
        rows[0]["pictures"] = rows[0]["pictures"] or tasks.images
        rows[0]["scores"]["geneval"] = over_seeds({asked.seeds[0]: tasks.overall})
        if missing := [task for task in geneval.TASKS if task not in tasks.tasks]:
            notes.append(f"the overall score is without the tasks {', '.join(missing)}")
    if len(asked.seeds) == 1:
        notes.append("one seed has no interval; give --seeds=2024,2025,2026")
    # What is written
    parameters = sum(leaf.size for leaf in jax.tree.leaves(pipe.params))
    about_model = {"name": subject.name, "description": pipe.description, "parameters": parameters}
    result = {
        "model": about_model | made_by,
        "prompts": _about_prompts(prompts),
        "geneval_prompts": _about_prompts(geneval_prompts),
        "sampler": {
            "name": "heun",
            "num_inference_steps": asked.num_inference_steps,
            "noise": "jax",
            "edm": dataclasses.asdict(pipe.edm),
        },
        "seeds": list(asked.seeds),
        "features": about_network,
        "reference": about_reference,
        "clip": clip_name,
        "side": asked.side,
        "results": rows,
        "geneval": None if tasks is None else tasks._asdict(),
        "notes": list(dict.fromkeys(notes)),
        "attribution": _attribution(subject),  # to be shown with the pictures
        "versions": report.environment(),
    }
    return result, report.write(out, result) if jax.process_index() == 0 else []


def _score(pipe, prompts, settings, folder, measures, asked, reference) -> dict[str, float]:
    """Scores of one set of pictures, drawn first as far as it is not there."""
    kept = (lambda i: folder / "images" / f"{i:06d}.png") if asked.keep_images else None
    rows = draw_set(
        pipe, prompts, settings, folder, measures, chunk_size=asked.chunk_size, picture_path=kept
    )
    found: dict[str, float] = {}
    for name, values in rows.items():
        if name.startswith("cosine"):
            found["clip_score"] = mean_score(values)
        else:
            found |= feature_scores(asked.metrics, values, reference)
    return found


def _geneval_prompts(asked: Request) -> PromptSet | None:
    """GenEval's prompts, where its pictures are to be drawn."""
    if "geneval" not in asked.metrics or not asked.geneval_prompts:
        return None
    prompts = read_prompts(asked.geneval_prompts)
    if not prompts.metadata:
        raise UserError(
            f"expected GenEval's .jsonl in --geneval_prompts, found {asked.geneval_prompts}"
        )
    return prompts


def _draw_geneval(pipe, prompts, settings, images, chunk_size) -> None:
    """Pictures in the folders that the benchmark's detector reads."""
    lay_out = functools.partial(geneval.write_metadata, images, prompts.metadata)
    hosts.from_first("lay out GenEval's folders", lay_out)
    draw_set(
        pipe, prompts, settings, images.parent, {}, chunk_size=chunk_size,
        picture_path=lambda i: geneval.picture_path(images, i),
    )  # fmt: skip


def _network(
    asked: Request, notes: list[str]
) -> tuple[FeatureNetwork | None, dict[str, Any] | None]:
    """The feature network, where a metric needs one, and what the result says of it."""
    if not set(FEATURE_METRICS) & set(asked.metrics):
        return None, None
    if "frechet_small" in asked.metrics:
        network = small_features()
        return network, {"name": network.name, "comparable_with_published_fid": False}
    folder = _model_folder("inception", Path(asked.inception))
    params, metadata = model_folder.load_model(folder)
    config = convert_inception.config_from_dict(metadata["inception"])
    weights = metadata.get("source", {}).get("sha256", "unknown")
    public = weights.startswith(PUBLIC_INCEPTION)
    if not public:
        notes.append(
            "--inception does not hold the public weights of 2015: no FID from it is comparable "
            "with a published one"
        )
    network = inception_features(config, params, weights=weights, mode=asked.resize)
    return network, {
        "name": network.name,
        "weights_sha256": weights,
        "comparable_with_published_fid": public,
    }


def _reference(
    subject: Subject, asked: Request, network: FeatureNetwork | None, out: Path, notes: list[str]
) -> tuple[Reference | None, dict[str, Any] | None]:
    """Statistics of real pictures, and what the result says of them."""
    if network is None:
        return None, None
    source, pipe = asked.reference or _default_reference(subject, asked), subject.pipe
    assert pipe.codec is not None
    resolution = pipe.model.config.input_size * pipe.codec.pixels_per_latent

    def get() -> Reference:
        return get_reference(
            source, network, out / "references", resolution=resolution, side=asked.side
        )

    # Computed on one process, read by all.
    hosts.from_first("compute the reference", lambda: get() and None, timeout_seconds=86400.0)
    reference = get()
    if reference.statistics.count is None:
        notes.append(f"{source} does not say how many pictures it was computed from")
    about = {"source": source, "statistics_sha256": reference.digest}
    return reference, about | reference.about


def _measures(asked: Request, network: FeatureNetwork | None) -> tuple[dict, str | None]:
    """What draw_set computes of each picture, by name; and the CLIP's name."""

    def prepared(images):
        return [crop_to(image, asked.side) for image in images] if asked.side else images

    measures, clip_name = {}, None
    if network is not None:
        measures[_key(network.name, asked)] = lambda images, _: network(prepared(images))
    if "clip_score" in asked.metrics:
        clip = convert_clip.load_encoder(_model_folder("clip", Path(asked.clip)))
        clip.params, clip_name = on_all_devices(clip.params), clip.name
        measures[f"cosine:{clip_name}"] = measure_cosines(clip)
    return measures, clip_name


def _key(name: str, asked: Request) -> str:
    return f"{name},side={asked.side}" if asked.side else name


def _model_folder(kind: str, path: Path) -> Path:
    """A converted model: the path itself, or made of it once."""
    if (path / "manifest.json").is_file():
        found = model_folder.read_metadata(path)["kind"]
        if found != kind:
            raise UserError(f"expected a model of kind {kind} in --{kind}, found {found} in {path}")
        return path
    if not path.exists():
        raise UserError(f"expected a model of kind {kind} in --{kind}, found nothing at {path}")
    return load.converted(kind, path)


def _default_reference(subject: Subject, asked: Request) -> str:
    """The embedded training pictures, for a run that was trained on them."""
    if subject.model.folder is None or not (Path(subject.model.vae) / "codec.json").is_file():
        raise UserError(
            "expected --reference, found none: .npz of statistics or a folder of real pictures "
            f"that {asked.prompts} belong to"
        )
    return RUN_SPLITS[0]


def _attribution(subject: Subject) -> str:
    """What the licence of a run's training pictures asks for."""
    if subject.model.folder is None:
        return ""
    return run_checkpoint.read_run_metadata(subject.model.folder).get("attribution", "")


def _about_prompts(prompts: PromptSet | None) -> dict[str, Any] | None:
    if prompts is None:
        return None
    return {"name": prompts.name, "sha256": prompts.digest, "count": len(prompts.texts)}
