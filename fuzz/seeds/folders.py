"""JSON of model folders and runs, and the settings inside PNGs."""

import json
from collections.abc import Mapping

from fuzz.targets import folders
from fuzz.targets.images import png_with

Corpus = Mapping[str, bytes]


def _model_config() -> Corpus:
    model = json.loads(folders.MODEL)
    return {
        "whole": folders.MODEL,
        "version": json.dumps(model | {"version": 2}).encode(),
        "no_kind": b'{"format": "microdit_jax.model", "version": 1}',
        "kind_is_a_list": json.dumps(model | {"kind": ["dit"]}).encode(),
        "dit_is_a_list": json.dumps(model | {"dit": [1, 2]}).encode(),
        "text_for_a_size": json.dumps(model | {"dit": {"dim": "64"}}).encode(),
        "sizes": json.dumps(model | {"dit": {"dim": -1, "depth": 10**12, "head_dim": 0}}).encode(),
        "infinite": json.dumps(model | {"dit": {"mlp_ratio": float("inf")}}).encode(),
        "unknown": json.dumps(model | {"dit": {"\x1b[2J": 1}}).encode(),
        "list": b"[]",
        "deep": b'{"format":' + b"[" * 3000,
        "number": b'{"version":' + b"9" * 4500 + b"}",
        "surrogate": b'{"format": "\\ud800"}',
    }


def _run_config() -> Corpus:
    run = {
        "format": "microdit_jax.run",
        "version": 1,
        "dit": {"dim": 64},
        "edm": {"sigma_data": 0.5},
    }
    run |= {"has_ema": True, "config": {"data": {"vae": "vae", "text_encoder": "table:width=4"}}}
    changes = {
        "whole": {},
        "edm_is_a_list": {"edm": [1]},
        "edm_unknown": {"edm": {"x": 1}},
        "edm_text": {"edm": {"sigma_data": "a"}},
        "no_config": {"config": None},
        "escape": {"config": {"data": {"vae": "\x1b[2J\nerror: forged"}}},
    }
    return {name: json.dumps(run | change).encode() for name, change in changes.items()} | {
        "empty": b"{}",
        "format_is_a_list": b'{"format": []}',
    }


def _manifest() -> Corpus:
    whole = json.loads(folders.MANIFEST)
    sha256 = whole["files"]["params/w/0"][1]
    files = {
        "nothing": {},
        "outside": {"../model/config.json": [1, sha256]},
        "absolute": {"/dev/zero": [0, sha256]},
        "device": {"params/../../../../../dev/zero": [0, sha256]},
        "size": {"params/w/0": ["16", sha256]},
        "pair": {"params/w/0": [16]},
        "missing": {"params/w/1": [16, sha256]},
        "null": {"params/\0": [16, sha256]},
        "surrogate": {"params/\ud800": [16, sha256]},
        "escape": {"params/\x1b[2J\nerror: forged": [16, sha256]},
        "long": {"params/" + "x" * 3000: [16, sha256]},
        "list": [["params/w/0", 16]],
    }
    found = {name: json.dumps(whole | {"files": value}).encode() for name, value in files.items()}
    arrays = {
        "arrays_list": [],
        "dtype": {"w": ["object", [4]]},
        "shape": {"w": ["float32", [-1, 1 << 70]]},
        "dtype_text": {"w": ["\x1b[2J", [4]]},
    }
    found |= {
        name: json.dumps(whole | {"arrays": value}).encode() for name, value in arrays.items()
    }
    return found | {"whole": folders.MANIFEST, "no_files": b"{}", "list_alone": b"[]"}


def _tfds_features() -> Corpus:
    names = "tensorflow_datasets.core.features."
    text = {"pythonClassName": f"{names}text_feature.Text", "text": {}}
    tensor = {
        "pythonClassName": f"{names}tensor_feature.Tensor",
        "tensor": {"shape": {"dimensions": ["4", "-1"]}, "dtype": "float16", "encoding": "none"},
    }
    table = f"{names}features_dict.FeaturesDict"

    def file(**features: object) -> bytes:
        return json.dumps(
            {"pythonClassName": table, "featuresDict": {"features": features}}
        ).encode()

    old = {"type": table, "content": {"a": {"type": text["pythonClassName"], "content": {}}}}
    nested: dict[str, object] = text
    for _ in range(40):
        nested = {
            "pythonClassName": f"{names}sequence_feature.Sequence",
            "sequence": {"feature": nested},
        }
    return {
        "whole": file(a=text, b=tensor),
        "old": json.dumps(old).encode(),
        "code": file(a={"pythonClassName": "os.system"}),
        "code_list": file(a={"pythonClassName": ["os.system"]}),
        "json_in_json": file(a={**text, "jsonFeature": {"json": "[" * 3000}}),
        "nested": file(a=nested),
        "sizes": file(a={**tensor, "tensor": {"shape": {"dimensions": ["9" * 4500, "x"]}}}),
        "escape": file(**{"\x1b[2J": {"pythonClassName": "\x1b[2J"}}),
        "list": b"[]",
    }


def _metrics() -> Corpus:
    lines = [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": None, "heldout": {"ema": {"right": 0.1, "by_sigma": {"0.1": 0.2}}}},
        {"step": 3, "speed": {"images_per_second": 10.0, "data_wait": 0.0}},
    ]
    odd = [[], {"loss": 1}, {"step": "<script>", "loss": 1}, {"step": 1, "loss": {}},
           {"step": 1, "heldout": [1]}, {"step": 1, "heldout": {"ema": 1}},
           {"step": 1, "heldout": {"<b>": {"right": "<i>"}}},
           {"step": 10**400, "loss": 1}]  # fmt: skip
    found = {f"odd_{i}": json.dumps(line).encode() + b"\n" for i, line in enumerate(odd)}
    return found | {
        "whole": b"".join(json.dumps(line).encode() + b"\n" for line in lines),
        "unfinished": b'{"step": 1}\n{"st',
        "deep": b"[" * 4000 + b"\n",
        "latin1": b"\xff\n",
        "separator": '{"step": 1, "a": "\u2028"}\n'.encode(),
    }


def _png_settings() -> Corpus:
    good = {"model": "instant", "vae": None, "text_encoder": None, "ema": True, "dtype": None,
            "num_inference_steps": 20, "guidance_scale": 3.0, "seed": 1, "noise": "jax", "of": 2,
            "made_with": "the instant model", "prompt": "red apple", "index": 0}  # fmt: skip
    changes = {
        "whole": {},
        "model_path": {"model": "/etc/passwd"},
        "hub": {"vae": "somebody/model", "text_encoder": "openclip:hf-hub:somebody/clip"},
        "index": {"index": -1},
        "index_text": {"index": "0"},
        "steps": {"num_inference_steps": 10**9},
        "steps_bool": {"num_inference_steps": True},
        "guidance": {"guidance_scale": float("inf")},
        "guidance_large": {"guidance_scale": 10**400},
        "of": {"of": 10**18, "index": 10**17},
        "seed": {"seed": 2**64},
        "escape": {"prompt": "\x1b[2J\nerror: forged"},
        "noise_list": {"noise": ["jax"]},
        "surrogate": {"prompt": "\ud800"},
    }
    found = {name: json.dumps(good | change).encode() for name, change in changes.items()}
    png = png_with(found["whole"].decode())
    return found | {
        "png": png,
        "png_zip": png_with(found["whole"].decode(), compress=True),
        "png_cut": png[:60],
        "png_list": png_with("[]"),
        "deep": b"[" * 4000,
        "number": b"9" * 4500,
        "missing": b"{}",
    }


MAKERS = {
    "model_config": _model_config,
    "run_config": _run_config,
    "manifest": _manifest,
    "metrics": _metrics,
    "tfds_features": _tfds_features,
    "png_settings": _png_settings,
}
