"""Statistics, prompts, a detector's results, and the description of a run's codec."""

import io
import json
from collections.abc import Mapping

import numpy as np

from fuzz.targets.scores import CODEC
from fuzz.zips import stored_zip

Corpus = Mapping[str, bytes]


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _npz() -> Corpus:
    mu, sigma = _npy(np.zeros(2)), _npy(np.eye(2))
    features, about = _npy(np.zeros((3, 2), np.float32)), _npy(np.array('{"count": 3}'))

    def shaped(shape: str, kind: str = "<f8") -> bytes:
        header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
        header = header.ljust(117) + b"\n"
        return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + bytes(16)

    def file(**members: bytes) -> bytes:
        return stored_zip({f"{name}.npy": data for name, data in members.items()})

    return {
        "whole": file(mu=mu, sigma=sigma, feats=features, about=about),
        "features": file(feats=features),
        "other_sizes": file(mu=mu, sigma=features),
        "huge": file(mu=shaped("(1000000000000,)"), sigma=sigma),
        "overflow": file(mu=shaped(f"({2**62}, 4)"), sigma=sigma),
        "negative": file(mu=shaped("(-1, -2)"), sigma=sigma),
        "objects": file(mu=shaped("(2,)", "|O"), sigma=sigma),
        "texts": file(mu=shaped("(2,)", "<U2"), sigma=sigma),
        "void": file(mu=shaped("(2,)", "|V0"), sigma=sigma),
        "deep": file(mu=shaped("(" * 50 + ")" * 50), sigma=sigma),
        "about_list": file(mu=mu, sigma=sigma, about=_npy(np.array("[]"))),
        "about_deep": file(mu=mu, sigma=sigma, about=_npy(np.array("[" * 900))),
        "one_array": mu,
        "pickle": b"\x80\2cos\nsystem\n.",
        "cut": file(mu=mu, sigma=sigma)[:-9],
    }


def _prompts() -> Corpus:
    annotations = [
        {"id": 2, "image_id": 1, "caption": "a"},
        {"id": 1, "image_id": 1, "caption": ""},
    ]
    line = {"tag": "colors", "prompt": "a red apple", "correct": True, "metadata": "{}"}
    odd = {
        "annotations_mixed": {"annotations": [{"id": 1}, {"id": "1"}]},
        "annotations_list": {"annotations": [[]]},
        "image_list": {"annotations": [{"id": 1, "image_id": [], "caption": "a"}]},
    }
    return {
        "text": b"\0a red apple\n\n a dog \n",
        "text_escape": b"\0\x1b[2J\r\nerror: forged\n",
        "csv": b'\1id,caption\n1,"a\nb"\n',
        "csv_null": b"\1caption\n\0\n",
        "csv_huge": b"\1caption\n" + b"x" * 3000,
        "tsv": b"\2caption\turl\na\tb\n",
        "json": b"\3" + json.dumps({"annotations": annotations}).encode(),
        **{name: b"\3" + json.dumps(value).encode() for name, value in odd.items()},
        "json_deep": b"\3" + b"[" * 4000,
        "lines": b"\4" + json.dumps(line).encode() + b"\n",
        "lines_tag": b"\4" + json.dumps(line | {"tag": ["colors"]}).encode(),
        "lines_deep": b"\4" + b"[" * 4000,
        "results": b"\5" + json.dumps(line).encode() + b"\n",
        "results_odd": b"\5" + json.dumps(line | {"metadata": [], "correct": "no"}).encode(),
        "latin1": b"\0\xff",
        "surrogate": b'\4{"tag": "colors", "prompt": "\\ud800"}',
    }


def _codec() -> Corpus:
    about = json.loads((CODEC / "codec.json").read_text())
    changes = {
        "whole": {},
        "patch_text": {"patch": "4"},
        "patch_true": {"patch": True},
        "patch_huge": {"patch": 10**30},
        "factor": {"scaling_factor": "x"},
        "factor_infinite": {"scaling_factor": float("inf")},
        "factor_huge": {"scaling_factor": 10**400},
        "name": {"name": ["\x1b[2J"]},
        "format": {"format": "\x1b[2J"},
        "version": {"version": [1]},
    }
    found = {name: json.dumps(about | change).encode() for name, change in changes.items()}
    return found | {"deep": b"[" * 4000, "list": b"[]", "latin1": b"\xff"}


MAKERS = {"npz": _npz, "prompts": _prompts, "codec": _codec}
