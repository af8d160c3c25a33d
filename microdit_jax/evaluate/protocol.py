"""Evaluates one model, read top to bottom: load, sample, score, write."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax

from microdit_jax.assets.known_words import emoji_sets
from microdit_jax.checkpoints.run import read_run_metadata
from microdit_jax.checkpoints.weights import weights_digest
from microdit_jax.errors import UserError
from microdit_jax.evaluate import results
from microdit_jax.evaluate.instruments import Instruments, make_instruments
from microdit_jax.evaluate.prompts import PromptSet, read_prompts
from microdit_jax.evaluate.request import EvaluationRequest, Subject
from microdit_jax.evaluate.sample_set import SamplerSettings, SampleSet
from microdit_jax.evaluate.scores import over_seeds
from microdit_jax.machine import agreement, hosts
from microdit_jax.metrics import geneval
from microdit_jax.sampling.settings import network_passes


def evaluate(
    subject: Subject, request: EvaluationRequest, out: Path
) -> tuple[dict[str, Any], list[Path]]:
    """Samples, scores and writes; the same call again resumes. All processes call it.

    Returns:
      The contents of result.json, and the files written.
    Raises:
      UserError: something is missing or does not fit; see `EvaluationRequest` and `SampleSet`.
    """
    plan = _plan(subject, request, out)
    rows = [_row(plan, scale) for scale in request.guidance_scales]
    tasks = _geneval_tasks(plan, rows)
    result = _result(plan, rows, tasks)
    return result, results.write(out, result) if jax.process_index() == 0 else []


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Inputs of one evaluation.

    Attributes:
      made_by: what the images are a function of beside prompts and sampler.
      prompts: for all metrics but GenEval, None if there are none such.
      geneval_prompts: GenEval's own, None if its images are not to be sampled.
    """

    subject: Subject
    request: EvaluationRequest
    out: Path
    made_by: dict[str, Any]
    instruments: Instruments
    prompts: PromptSet | None
    geneval_prompts: PromptSet | None

    def set_folder(self, guidance_scale: float, seed: int) -> Path:
        return self.out / f"guidance_{guidance_scale:g}" / f"seed_{seed}"

    def geneval_images(self, guidance_scale: float, seed: int) -> Path:
        return self.set_folder(guidance_scale, seed) / "geneval" / "images"


def _plan(subject: Subject, request: EvaluationRequest, out: Path) -> _Plan:
    pipe = subject.pipe
    assert pipe.codec is not None
    made_by = {
        "weights": weights_digest(pipe.params),
        "dit": repr(pipe.model.config),
        "vae": pipe.codec.name,
        "text_encoder": pipe.text_encoder.name,
    }
    instruments = make_instruments(subject, request, out)
    prompts, geneval_prompts = None, _geneval_prompts(request)
    if instruments.measurements:
        sets = emoji_sets(subject.model)
        prompts = read_prompts(request.prompts, request.num_images, emoji=sets)
    read = {
        "prompts": _about_prompts(prompts),
        "GenEval's prompts": _about_prompts(geneval_prompts),
    }
    agreement.agree(made_by | agreement.flat(read))
    return _Plan(subject, request, out, made_by, instruments, prompts, geneval_prompts)


def _geneval_prompts(request: EvaluationRequest) -> PromptSet | None:
    """Reads GenEval's prompts, where its images are to be sampled."""
    if "geneval" not in request.metrics or not request.geneval_prompts:
        return None
    prompts = read_prompts(request.geneval_prompts)
    if not prompts.metadata:
        raise UserError(
            f"expected GenEval's .jsonl in --geneval_prompts, found {request.geneval_prompts}"
        )
    return prompts


# ------------------------------------------------------------------ sampling
def _sample_and_score(plan: _Plan, prompts: PromptSet, scale: float, seed: int) -> dict[str, float]:
    """Returns the scores of one set of images, sampled first as far as it is not there."""
    folder = plan.set_folder(scale, seed)
    samples = SampleSet(
        plan.subject.pipe,
        prompts,
        _sampler(plan, scale, seed),
        folder,
        made_by=plan.made_by,
        chunk_size=plan.request.chunk_size,
        image_path=_image_path if plan.request.keep_images else None,
    )
    measurements = plan.instruments.measurements
    rows = samples.measure({m.key: m.measure for m in measurements})
    found: dict[str, float] = {}
    for measurement in measurements:
        found |= measurement.scores(rows[measurement.key])
    return found


def _image_path(folder: Path, index: int) -> Path:
    return folder / "images" / f"{index:06d}.png"


def _sample_for_geneval(plan: _Plan, prompts: PromptSet, scale: float, seed: int) -> None:
    """Writes images into the folders that the benchmark's detector reads."""
    images = plan.geneval_images(scale, seed)
    lay_out = functools.partial(geneval.write_metadata, images, prompts.metadata)
    hosts.from_first("lay out GenEval's folders", lay_out)
    samples = SampleSet(
        plan.subject.pipe,
        prompts,
        _sampler(plan, scale, seed),
        images.parent,
        made_by=plan.made_by,
        chunk_size=plan.request.chunk_size,
        image_path=_geneval_image_path,
    )
    samples.measure({})


def _geneval_image_path(folder: Path, index: int) -> Path:
    return geneval.image_path(folder / "images", index)


def _sampler(plan: _Plan, scale: float, seed: int) -> SamplerSettings:
    request = plan.request
    return SamplerSettings(seed, request.sampler_at(scale), request.batch_size)


# ------------------------------------------------------------------ scoring
def _row(plan: _Plan, scale: float) -> dict[str, Any]:
    """Returns a row of the result: the scores of one guidance scale over all seeds."""
    by_seed: dict[str, dict[int, float]] = {}
    for seed in plan.request.seeds:
        if plan.prompts is not None:
            for name, value in _sample_and_score(plan, plan.prompts, scale, seed).items():
                by_seed.setdefault(name, {})[seed] = value
        if plan.geneval_prompts is not None:
            _sample_for_geneval(plan, plan.geneval_prompts, scale, seed)
    sampled = plan.prompts or plan.geneval_prompts
    evaluations = plan.request.sampler_at(scale).plan(plan.subject.pipe.edm)
    return {
        "guidance_scale": scale,
        "evaluations": len(evaluations),
        "network_passes": network_passes(evaluations),
        "images": 0 if sampled is None else len(sampled.texts),
        "scores": {name: over_seeds(values) for name, values in by_seed.items()},
    }


def _geneval_tasks(plan: _Plan, rows: list[dict[str, Any]]) -> geneval.Scores | None:
    """Reads the detector's results, if there are any, into the only row."""
    request = plan.request
    if not request.geneval_results:
        return None
    tasks = geneval.scores(Path(request.geneval_results))
    rows[0]["images"] = rows[0]["images"] or tasks.images
    rows[0]["scores"]["geneval"] = over_seeds({request.seeds[0]: tasks.overall})
    return tasks


# ------------------------------------------------------------------ result
def _result(
    plan: _Plan, rows: list[dict[str, Any]], tasks: geneval.Scores | None
) -> dict[str, Any]:
    """Returns the contents of result.json: the scores, and all that they depend on."""
    subject, request, pipe = plan.subject, plan.request, plan.subject.pipe
    parameters = sum(leaf.size for leaf in jax.tree.leaves(pipe.params))
    about = {"name": subject.name, "description": pipe.description, "parameters": parameters}
    about["ema_length"] = subject.model.ema_length
    return {
        "model": about | plan.made_by,
        "prompts": _about_prompts(plan.prompts),
        "geneval_prompts": _about_prompts(plan.geneval_prompts),
        "sampler": {
            "name": request.sampler.solver,
            "num_inference_steps": request.sampler.steps,
            **_about_sampler(request),
            "noise": "jax",
            "edm": dataclasses.asdict(pipe.edm),
        },
        "seeds": list(request.seeds),
        "features": plan.instruments.features,
        "reference": plan.instruments.reference,
        "clip": plan.instruments.clip,
        "side": request.side,
        "results": rows,
        "geneval": None if tasks is None else tasks._asdict(),
        "notes": _notes(plan, tasks),
        "attribution": _attribution(subject),
        "versions": results.environment(),
    }


def _about_sampler(request: EvaluationRequest) -> dict[str, Any]:
    """Returns the sampler's settings beside its name, steps and guidance scales."""
    elsewhere = ("solver", "num_inference_steps", "guidance_scale")
    settings = dataclasses.asdict(request.sampler).items()
    return {name: value for name, value in settings if name not in elsewhere}


def _notes(plan: _Plan, tasks: geneval.Scores | None) -> list[str]:
    """Lists what a reader of the scores should know, and what is left to do."""
    request, notes = plan.request, list(plan.instruments.notes)
    if plan.geneval_prompts is not None and tasks is None:
        for scale in request.guidance_scales:
            for seed in request.seeds:
                images = plan.geneval_images(scale, seed)
                notes.append(f"run GenEval's detector over {images}, then --geneval_results")
    if tasks is not None:
        if missing := [task for task in geneval.TASKS if task not in tasks.tasks]:
            notes.append(f"the overall score is without the tasks {', '.join(missing)}")
    if len(request.seeds) == 1:
        notes.append("one seed has no interval; give --seeds=2024,2025,2026")
    return notes


def _attribution(subject: Subject) -> str:
    """Returns what the licence of a run's training images asks to be shown with samples."""
    if subject.model.folder is None:
        return ""
    return read_run_metadata(subject.model.folder).get("attribution", "")


def _about_prompts(prompts: PromptSet | None) -> dict[str, Any] | None:
    if prompts is None:
        return None
    return {"name": prompts.name, "sha256": prompts.digest, "count": len(prompts.texts)}
