"""Requests of the page, and lines of the preflight."""

import json
from collections.abc import Mapping

Corpus = Mapping[str, bytes]


def _page_request() -> Corpus:
    good = {"model": "instant", "prompt": "red apple", "guidance_scale": 3,
            "num_inference_steps": 20, "seed": 1, "count": 1}  # fmt: skip
    changes = {
        "whole": {},
        "model": {"model": "../x"},
        "model_list": {"model": [[]]},
        "prompt": {"prompt": "x" * 2000},
        "prompt_escape": {"prompt": "\x1b[2J"},
        "prompt_surrogate": {"prompt": "\ud800"},
        "guidance": {"guidance_scale": float("nan")},
        "guidance_large": {"guidance_scale": 10**400},
        "steps": {"num_inference_steps": 10**9},
        "count_bool": {"count": True},
        "unknown": {"\x1b[2J": 1},
    }
    found = {name: json.dumps(good | change).encode() for name, change in changes.items()}
    return found | {
        "deep": b"[" * 4000,
        "number": b"9" * 4400,
        "latin1": b'{"a": "\xff"}',
        "list": b"[]",
    }


MAKERS = {"page_request": _page_request}
