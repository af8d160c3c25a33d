"""Readers of the JSON in model folders and training runs."""

import hashlib

from fuzz.grammar import json_document, json_lines
from fuzz.scratch import Scratch
from fuzz.targets import Read, Target
from microdit_jax.checkpoints import model_folder
from microdit_jax.checkpoints.run import read_run_metadata
from microdit_jax.convert import dit
from microdit_jax.convert.arguments import config_from_fields
from microdit_jax.data import tfds_folder
from microdit_jax.diffusion import EdmConfig
from microdit_jax.errors import UserError
from microdit_jax.training import report

ARRAY = b"\0" * 16
MANIFEST = b'{"arrays": {"w": ["float32", [4]]}, "files": {"params/w/0": [16, "%s"]}}' % (
    hashlib.sha256(ARRAY).hexdigest().encode()
)
MODEL = b'{"format": "microdit_jax.model", "version": 1, "kind": "dit", "dit": {"dim": 64}}'


def _open_model_config(scratch: Scratch) -> Read:
    scratch.file("model/manifest.json", MANIFEST)
    scratch.file("model/params/w/0", ARRAY)

    def read(data: bytes) -> None:
        scratch.file("model/config.json", data)
        metadata = model_folder.read_metadata(scratch.folder / "model")
        if metadata["kind"] == "dit":
            dit.config_from_dict(metadata["dit"])

    return read


def _open_manifest(scratch: Scratch) -> Read:
    scratch.file("model/config.json", MODEL)
    scratch.file("model/params/w/0", ARRAY)

    def read(data: bytes) -> None:
        scratch.file("model/manifest.json", data)
        model_folder.verify_model(scratch.folder / "model")

    return read


def _open_run_config(scratch: Scratch) -> Read:
    def read(data: bytes) -> None:
        scratch.file("run/config.json", data)
        metadata = read_run_metadata(scratch.folder / "run", "dit", "edm", "config.data.vae")
        dit.config_from_dict(metadata["dit"])
        config_from_fields(EdmConfig, metadata["edm"])

    return read


def _open_features(scratch: Scratch) -> Read:
    def read(data: bytes) -> None:
        scratch.file("tfds/features.json", data)
        tfds_folder.read_features(scratch.folder / "tfds")

    return read


def _open_metrics(scratch: Scratch) -> Read:
    scratch.file("run/config.json", b'{"format": "microdit_jax.run", "version": 1}')

    def read(data: bytes) -> None:
        scratch.file("run/metrics.jsonl", data)
        for run in report.read([scratch.folder / "run"]):
            report.series(run.lines)

    return read


TARGETS = {
    "model_config": Target(
        _open_model_config,
        (UserError, OSError),
        (b'"format":', b'"version":1', b'"kind":"dit"', b'"dit":{', b'"dim":', b"null", b"1e999"),
        json_document,
    ),
    "run_config": Target(
        _open_run_config,
        (UserError, OSError),
        (b'"format":', b'"dit":{', b'"edm":{', b'"config":{"data":{', b"null", b'"has_ema":'),
        json_document,
    ),
    "manifest": Target(
        _open_manifest,
        (UserError, OSError),
        (b'"arrays":{', b'"files":{', b'"../', b"/dev/zero", b'"params/', b"[0,", b"null"),
        json_document,
    ),
    "tfds_features": Target(
        _open_features,
        (UserError, OSError),
        (
            b'"pythonClassName":',
            b'"tensorflow_datasets.core.features.',
            b'"type":',
            b'"content":',
            b'"jsonFeature":{"json":"',
            b'"featuresDict":{"features":{',
            b'"feature":',
            b'"shape":',
        ),
        json_document,
    ),
    "metrics": Target(
        _open_metrics,
        (UserError, OSError),
        (b'{"step":', b'"loss":', b'"heldout":{', b'"ema":', b'"right":', b"null", b"\n"),
        json_lines,
    ),
}
