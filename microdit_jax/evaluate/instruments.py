"""Instruments of an evaluation: feature networks, reference statistics, a CLIP."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from microdit_jax.assets import load
from microdit_jax.assets.known_words import emoji_sets
from microdit_jax.checkpoints import model_folder
from microdit_jax.convert import clip as convert_clip
from microdit_jax.convert import inception as convert_inception
from microdit_jax.errors import UserError
from microdit_jax.evaluate.prompts import RUN_SPLITS
from microdit_jax.evaluate.reference import crop_to, get_reference
from microdit_jax.evaluate.request import EvaluationRequest, Subject
from microdit_jax.evaluate.sample_set import Measure
from microdit_jax.evaluate.scores import FEATURE_METRICS, feature_scores, measure_cosines
from microdit_jax.machine import hosts
from microdit_jax.metrics.clip_score import mean_score
from microdit_jax.metrics.features import (
    FeatureNetwork,
    inception_features,
    on_all_devices,
    small_features,
)
from microdit_jax.metrics.statistics import Reference

PUBLIC_INCEPTION = "6726825d"  # the first digits of the public weights' sha256
REFERENCE_SECONDS = 86400.0  # how long processes wait for the one that computes the reference


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One thing that is measured of each image, and the scores of a whole set.

    Attributes:
      key: name of the measured rows in a set's files.
      measure: images and prompts to rows.
      scores: all rows of a set to scores by name.
    """

    key: str
    measure: Measure
    scores: Callable[[np.ndarray], dict[str, float]]


@dataclasses.dataclass
class Instruments:
    """The measurements of an evaluation, with their descriptions.

    Attributes:
      features, reference, clip: what result.json says of them; None where there is none.
      notes: what a reader of the scores should know.
    """

    measurements: list[Measurement] = dataclasses.field(default_factory=list)
    features: dict[str, Any] | None = None
    reference: dict[str, Any] | None = None
    clip: str | None = None
    notes: list[str] = dataclasses.field(default_factory=list)


def make_instruments(subject: Subject, request: EvaluationRequest, out: Path) -> Instruments:
    """Loads networks and statistics for the metrics that are asked for.

    Args:
      out: references that must be computed are kept in its folder references/.
    Raises:
      UserError: a network or a reference that is missing or does not fit.
    """
    made = Instruments()
    if set(FEATURE_METRICS) & set(request.metrics):
        _add_features(made, subject, request, out)
    if "clip_score" in request.metrics:
        _add_clip(made, request)
    return made


def _add_features(
    made: Instruments, subject: Subject, request: EvaluationRequest, out: Path
) -> None:
    network = _feature_network(made, request)
    reference = _reference(made, subject, request, network, out)

    def measure(images, _):
        side = request.side
        return network([crop_to(image, side) for image in images] if side else images)

    made.measurements.append(
        Measurement(
            f"{network.name},side={request.side}" if request.side else network.name,
            measure,
            lambda rows: feature_scores(request.metrics, rows, reference),
        )
    )


def _add_clip(made: Instruments, request: EvaluationRequest) -> None:
    assert request.clip is not None  # EvaluationRequest asks for it
    clip = convert_clip.load_encoder(_model_folder("clip", Path(request.clip)))
    clip.params, made.clip = on_all_devices(clip.params), clip.name
    made.measurements.append(
        Measurement(
            f"cosine:{clip.name}",
            measure_cosines(clip),
            lambda rows: {"clip_score": mean_score(rows)},
        )
    )


def _feature_network(made: Instruments, request: EvaluationRequest) -> FeatureNetwork:
    if "frechet_small" in request.metrics:
        network = small_features()
        made.features = {"name": network.name, "comparable_with_published_fid": False}
        return network
    assert request.inception is not None  # EvaluationRequest asks for it
    params, metadata = model_folder.load_model(_model_folder("inception", Path(request.inception)))
    config = convert_inception.config_from_dict(metadata["inception"])
    weights = metadata.get("source", {}).get("sha256", "unknown")
    public = weights.startswith(PUBLIC_INCEPTION)
    if not public:
        made.notes.append(
            "--inception does not hold the public weights of 2015: no FID from it is comparable "
            "with a published one"
        )
    network = inception_features(config, params, weights=weights, mode=request.resize)
    made.features = {
        "name": network.name,
        "weights_sha256": weights,
        "comparable_with_published_fid": public,
    }
    return network


def _reference(
    made: Instruments,
    subject: Subject,
    request: EvaluationRequest,
    network: FeatureNetwork,
    out: Path,
) -> Reference:
    """Returns the statistics of real images."""
    source, pipe = request.reference or _default_reference(subject, request), subject.pipe
    assert pipe.codec is not None
    resolution = pipe.model.config.input_size * pipe.codec.pixels_per_latent

    def get() -> Reference:
        return get_reference(
            source,
            network,
            out / "references",
            resolution=resolution,
            side=request.side,
            emoji=emoji_sets(subject.model),
        )

    # One process computes and writes the file, then all read it.
    hosts.from_first(
        "compute the reference", lambda: get() and None, timeout_seconds=REFERENCE_SECONDS
    )
    reference = get()
    if reference.statistics.count is None:
        made.notes.append(f"{source} does not say how many images it was computed from")
    made.reference = {"source": source, "statistics_sha256": reference.digest} | reference.about
    return reference


def _default_reference(subject: Subject, request: EvaluationRequest) -> str:
    """Returns the embedded training images, for a run that was trained on them."""
    folder, vae = subject.model.folder, subject.model.vae
    if folder is None or vae is None or not (Path(vae) / "codec.json").is_file():
        raise UserError(
            "expected --reference, found none: .npz of statistics or a folder of real images "
            f"that {request.prompts} belong to"
        )
    return RUN_SPLITS[0]


def _model_folder(kind: str, path: Path) -> Path:
    """Returns the folder of a converted model: the path itself, or what is converted from it."""
    if (path / "manifest.json").is_file():
        found = model_folder.read_metadata(path)["kind"]
        if found != kind:
            raise UserError(f"expected a model of kind {kind} in --{kind}, found {found} in {path}")
        return path
    if not path.exists():
        raise UserError(f"expected a model of kind {kind} in --{kind}, found nothing at {path}")
    return load.converted(kind, path)
