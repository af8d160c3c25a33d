"""Requests of the page, and lines of the preflight."""

import json
from collections.abc import Mapping

from fuzz.targets.messages import NONCE, TOKEN
from microdit_jax.machine import handshake

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


def _preflight() -> Corpus:
    who = handshake.Introduction(1, 4, "host-1.local", NONCE)
    introduction = json.loads(handshake.introduce(who, NONCE, TOKEN))
    changes = {
        "number_is_a_list": {"process_id": [1]},
        "number_is_a_text": {"process_id": "1"},
        "number_is_true": {"process_id": True},
        "process_0": {"process_id": 0},
        "beyond": {"process_id": 10**30},
        "many": {"num_processes": 10**9},
        "host": {"host": "\x1b[2J\nerror: forged"},
        "host_long": {"host": "h" * 3000},
        "proof": {"proof": "\u00e9"},
        "proof_missing": {"proof": None},
        "nonce": {"nonce": "0" * 31},
    }
    lines = {name: json.dumps(introduction | change) for name, change in changes.items()}
    fault = handshake.answer("\x1b[2J missing: 3", NONCE, TOKEN)
    return {name: b"\1" + line.encode() for name, line in lines.items()} | {
        "greeting": b"\0" + handshake.greeting(NONCE).strip(),
        "introduction": b"\1" + handshake.introduce(who, NONCE, TOKEN).strip(),
        "answer": b"\2" + fault.strip(),
        "answer_without_token": b"\2" + handshake.answer("", NONCE, "").strip(),
        "deep": b"\1" + b"[" * 4000,
        "number": b"\1" + b"9" * 4000,
        "list": b"\2[]",
        "latin1": b"\0\xff",
    }


MAKERS = {"preflight": _preflight, "page_request": _page_request}
