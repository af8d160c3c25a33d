"""HTTP around the studio, without a port: bounded requests, and what an image tells."""

import asyncio
import contextlib
import json
import subprocess
import sys
import types

import pytest
from conftest import ROOT

from microdit_jax.app import following, server
from microdit_jax.app.limits import Limits
from microdit_jax.app.studio import Studio

GOOD = {
    "model": "tiny", "prompt": "red apple", "guidance_scale": 2, "num_inference_steps": 3,
    "seed": 3, "count": 1,
}  # fmt: skip


class Idle(Studio):
    """A studio that keeps the listeners for the test to call."""

    def __init__(self):
        super().__init__({}, limits=LIMITS)
        self.models, self.listeners = {"tiny": None}, []

    def submit(self, request, listener):
        self.listeners.append(listener)
        return types.SimpleNamespace(cancel=lambda: None)


LIMITS = Limits(body_seconds=0.2, unread_events=3)
SCOPE = {
    "type": "http", "method": "POST", "path": "/sample", "query_string": b"",
    "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
}  # fmt: skip


def ask(chunks, pause=0.0, ends=True):
    """Posts a body in chunks; returns the status and the answer."""
    waiting = [{"type": "http.request", "body": c, "more_body": True} for c in chunks]
    if ends:
        waiting.append({"type": "http.request", "body": b"", "more_body": False})
    sent = []

    async def receive():
        await asyncio.sleep(pause)
        if not waiting:
            await asyncio.sleep(60)
        return waiting.pop(0)

    async def send(message):
        sent.append(message)

    app = server.make_app(Idle(), {}, ["localhost"])
    asyncio.run(asyncio.wait_for(app(SCOPE, receive, send), 20))
    return sent[0]["status"], json.loads(sent[1]["body"])["error"]


def test_a_page_that_does_not_read_gets_no_previews():
    studio, sent = Idle(), []

    async def run():
        reading = asyncio.Event()
        body = [{"type": "http.request", "body": json.dumps(GOOD).encode(), "more_body": False}]

        async def receive():
            if not body:
                await asyncio.sleep(60)
            return body.pop()

        async def send(message):
            if len(sent) > 1:  # all but the status and the first line
                await reading.wait()
            sent.append(message.get("body", b""))

        app = server.make_app(studio, {}, ["localhost"])
        answer = asyncio.create_task(app(SCOPE, receive, send))
        while len(sent) < 2:
            await asyncio.sleep(0.01)
        for step in range(20):
            studio.listeners[0]({"event": "step", "step": step, "previews": ["x" * 1000]})
            await asyncio.sleep(0)
        studio.listeners[0]({"event": "done"})
        reading.set()
        await asyncio.wait_for(answer, 20)

    asyncio.run(run())
    job, *steps, done = (json.loads(line) for line in b"".join(sent).splitlines())
    assert (job["event"], done["event"]) == ("job", "done")
    assert [event["step"] for event in steps] == list(range(20))
    assert 1 <= sum("previews" in event for event in steps) <= LIMITS.unread_events + 2


@pytest.mark.parametrize(
    "body, told",
    [
        (b"[" * 30_000, "expected JSON"),
        (b"9" * 30_000, "expected JSON"),
        (b'{"a": "\xff"}', "expected JSON"),
        (b'{"prompt": "\\ud800"}', "expected JSON"),
        (b"[]", "found no object"),
        (json.dumps(GOOD | {"guidance_scale": 10**400}).encode(), "guidance as a number"),
        (json.dumps({"\x1b[2J": 1}).encode(), "\\x1b[2J"),
    ],
)
def test_bodies_that_are_no_request(body, told):
    status, answer = ask([body])
    assert status == 400 and told in answer and answer.isprintable()


def test_a_body_has_an_end_in_bytes_and_in_time():
    assert ask([b"x" * 20_000] * 1000) == (
        413,
        "the request is too long; shorten the prompt, or give a smaller image",
    )
    assert ask([b"x"] * 1000, pause=0.05)[0] == 408
    assert ask([b"x"], ends=False)[0] == 408


PROGRAM = """
import json, os, sys, types
from absl import flags
from microdit_jax.app import __main__ as app

given = sys.argv[1]
flags.FLAGS(["x", f"--model={given}", f"--vae={given}/vae", "--model=instant"])
model = types.SimpleNamespace(folder=None, text_encoder=None, guidance_scale=None)
def load(name):
    return types.SimpleNamespace(description=f"{os.path.normpath(name)}, step 7"), model
app.model_flags.load = load
models = app._load()
print(json.dumps({name: model.settings for name, model in models.items()}))
"""


def test_an_image_of_the_page_does_not_tell_where_the_model_lies(tmp_path):
    run = tmp_path / "home of somebody" / "runs" / "stage"
    (run / "vae").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, f"{run}/"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    settings = json.loads(done.stdout)
    assert "somebody" not in done.stdout and list(settings) == ["runs/stage", "instant"]
    found = settings["runs/stage"]
    assert (found["model"], found["vae"]) == ("runs/stage", "stage/vae")
    assert found["made_with"] == "runs/stage, step 7"
    assert settings["instant"]["model"] == "instant"


# ------------------------------------------------------------------ pages that come back
class Told:
    """A job whose end by the server is seen."""

    def __init__(self):
        self.cancelled = False

    def cancel(self):
        self.cancelled = True


def followed(keep=False):
    """A job that nobody follows yet, and the listener that the studio would call."""
    job, listeners, jobs = Told(), [], following.Jobs(Limits(alone_seconds=0.1, kept_jobs=2))
    return jobs, jobs.begin(lambda listener: listeners.append(listener) or job, keep=keep), job


async def read(one, most=100) -> list:
    found = []
    async with contextlib.aclosing(one.events()) as events:
        async for event in events:
            found.append(event["event"])
            if len(found) == most:
                break
    return found


def test_a_page_that_comes_back_is_told_what_it_missed():
    async def run():
        _, one, job = followed()
        for event in ("queued", "started", "step", "step"):
            one.listener({"event": event})
        assert await read(one, most=4) == ["job", "queued", "started", "step"]
        one.listener({"event": "step"})
        one.listener({"event": "done", "images": []})
        await asyncio.sleep(0.01)
        assert await read(one) == ["job", "queued", "started", "done"]
        await asyncio.sleep(0.2)
        assert not job.cancelled  # it had ended
        one.listener({"event": "step"})
        assert await read(one) == ["job", "queued", "started", "done"]

    asyncio.run(asyncio.wait_for(run(), 20))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("came", [False, True])
def test_without_a_page_a_job_ends_unless_it_is_kept(keep, came):
    async def run():
        _, one, job = followed(keep)
        if came:
            assert await read(one, most=1) == ["job"]
        await asyncio.sleep(0.5)
        assert job.cancelled == (not keep)
        if not keep:
            assert await read(one) == ["job", "error"]

    asyncio.run(asyncio.wait_for(run(), 20))


def test_the_oldest_jobs_are_forgotten():
    async def run():
        jobs, one, _ = followed(keep=True)
        for _ in range(2):
            assert jobs.get(one.id) is one
            jobs.begin(lambda listener: Told(), keep=True)
        assert jobs.get(one.id) is None

    asyncio.run(asyncio.wait_for(run(), 20))
