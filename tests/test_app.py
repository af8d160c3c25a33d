"""The page's studio without a browser: what may be asked, whose turn it is, what comes out.

tests/ui has the page itself in a browser (make test-ui).
"""

import base64
import io
import json
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image
from support.tiny_pipeline import pipeline

from microdit_jax.app.limits import Limits, read_request
from microdit_jax.app.studio import PageModel, Studio
from microdit_jax.errors import UserError

GOOD = {
    "model": "tiny", "prompt": "red apple", "guidance_scale": 2, "num_inference_steps": 3,
    "seed": 3, "count": 1,
}  # fmt: skip
LIMITS = Limits(prompt_characters=20, steps=10, count=3, waiting=2)


def test_a_good_request():
    asked = read_request(GOOD | {"prompt": "  red\n apple "}, ["tiny"], LIMITS)
    assert asked.prompt == "red apple" and asked.guidance_scale == 2.0


def data_url(*, size=(20, 16), white=None) -> str:
    """A small image, or a mask that is white right of a column."""
    image = Image.new("L" if white is not None else "RGB", size, 0 if white is not None else "red")
    if white is not None:
        image.paste(255, (white, 0, *size))
    file = io.BytesIO()
    image.save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_a_request_may_have_a_sampler_and_an_image():
    more = {"solver": "ab3", "guidance": "interval", "negative_prompt": " a  dog "}
    more |= {"image": data_url(), "strength": 0.5, "mask": data_url(white=10)}
    asked = read_request(GOOD | more, ["tiny"], LIMITS)
    assert (asked.solver, asked.guidance, asked.negative_prompt) == ("ab3", "interval", "a dog")
    assert asked.strength == 0.5 and asked.image and asked.image.startswith(b"\x89PNG")
    empty = {name: None for name in more}
    assert read_request(GOOD | empty, ["tiny"], LIMITS) == read_request(GOOD, ["tiny"], LIMITS)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"solver": "student"}, "expected a solver of heun, .* found student"),
        ({"guidance": "auto"}, "expected a kind of guidance of cfg, interval, apg, found auto"),
        ({"negative_prompt": 3}, "expected a prompt"),
        ({"mask": data_url(white=1)}, "an image with its mask and strength, found none"),
        ({"strength": 0.5}, "an image with its mask and strength, found none"),
        ({"image": data_url()}, "a strength as a number from 0.01 to 1, found nothing"),
        ({"image": data_url(), "strength": 2}, "found 2"),
        ({"image": "/etc/passwd", "strength": 1}, "the image as an image file, found /etc"),
        ({"image": "data:image/png;base64,%", "strength": 1}, "found a damaged one"),
        ({"prompt": " \n"}, "expected a prompt, found an empty one"),
        ({"prompt": None}, "expected a prompt"),
        ({"prompt": "a" * 21}, "at most 20 characters, found 21; shorten it"),
        ({"prompt": "a\x00b"}, "found control characters"),
        ({"num_inference_steps": 0}, "steps as a whole number from 1 to 10, found 0"),
        ({"num_inference_steps": 11}, "found 11"),
        ({"num_inference_steps": 2.5}, "found 2.5"),
        ({"num_inference_steps": True}, "found True"),
        ({"count": 4}, "images as a whole number from 1 to 3, found 4"),
        ({"count": None}, "found nothing"),
        ({"seed": -1}, "a seed as a whole number from 0 to 4294967295"),
        ({"guidance_scale": float("nan")}, "guidance as a number from 1 to 20, found nan"),
        ({"guidance_scale": "9" * 1000}, "found 9999"),
        ({"guidance_scale": 10**400}, "found 1000"),
        ({"guidance_scale": "\x1b[2J"}, r"found \\x1b"),
        ({"seed": [[]]}, "found a list"),
        ({"\x1b" * 9000: 1}, "expected the values model, prompt"),
        ({"model": "../../etc/passwd"}, "expected one of the models tiny"),
        ({"model": ["tiny"]}, "expected one of the models tiny"),
        ({"path": "x"}, "expected the values model, prompt"),
    ],
)
def test_refused(wrong, message):
    with pytest.raises(UserError, match=message) as error:
        read_request(GOOD | wrong, ["tiny"], LIMITS)
    assert len(str(error.value)) < 600 and str(error.value).isprintable()
    for not_an_object in (None, [], "x", 3):
        with pytest.raises(UserError, match="found no object"):
            read_request(not_an_object, ["tiny"], LIMITS)


class Listener:
    """Keeps the events of a job; `end` waits for the last of them."""

    def __init__(self):
        self.events, self._ended = [], threading.Event()

    def __call__(self, event):
        json.dumps(event)  # it must travel
        self.events.append(event)
        if event["event"] in ("done", "error"):
            self._ended.set()

    def end(self):
        assert self._ended.wait(60), self.events
        return self.events[-1]


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_addresses_of_both_kinds():
    """In a process of its own: absl's flags are global, and other commands have some of these."""
    program = """
import socket
from microdit_jax.app.__main__ import listen
for host, reached in ("127.0.0.1", "127.0.0.1"), ("::", "127.0.0.1 ::1"), ("::1", "::1"):
    with listen(host, 0) as server:
        for address in reached.split():
            socket.create_connection((address, server.getsockname()[1]), timeout=5).close()
    print(host)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.split() == ["127.0.0.1", "::", "::1"], run.stderr


WORDS = frozenset("abcdefghij")


@pytest.fixture
def studio():
    settings = {"model": "m", "vae": None, "text_encoder": None, "ema": True, "dtype": None}
    settings["made_with"] = "a tiny model"
    studio = Studio({"tiny": PageModel(pipeline(), settings, WORDS)}, limits=LIMITS, batch_size=2)
    yield studio
    studio.close()


def ask(studio, **changed):
    listener = Listener()
    job = studio.submit(read_request(GOOD | changed, ["tiny"], LIMITS), listener)
    return job, listener


def test_sampled_in_order_with_previews_and_settings(studio):
    _, first = ask(studio)
    cancelled, _ = ask(studio, seed=9)
    with pytest.raises(UserError, match="at most 2 requests waiting"):
        ask(studio)
    cancelled.cancel()
    _, second = ask(studio, count=3)  # the place of the cancelled one
    assert second.events[0] == {"event": "queued", "ahead": 1}
    studio.start()
    done = second.end()
    assert first.end()["event"] == "done" == done["event"]
    assert second.events[-2]["previews"][0].startswith("data:image/png;base64,")
    steps = [(e["first"], e["step"]) for e in second.events if e["event"] == "step"]
    assert steps == [(0, 1), (0, 2), (0, 3), (2, 1), (2, 2), (2, 3)]  # batches of 2 and 1

    expected = pipeline().generate(
        ["red apple"] * 3, guidance_scale=2.0, num_inference_steps=3, seed=3, batch_size=2
    )
    for i, name in enumerate(done["images"]):
        file = studio.image(name)
        assert file.file_name == f"{i:04d}_red-apple.png"
        with Image.open(io.BytesIO(file.png)) as image:
            settings = json.loads(image.text["microdit_jax"])
            np.testing.assert_allclose(np.asarray(image) / 255, expected[i], atol=1.5 / 255)
        assert settings.items() >= {"model": "m", "seed": 3, "index": i, "of": 3}.items()
    (alone,) = first.end()["images"]
    assert studio.image(alone).png != studio.image(done["images"][0]).png  # "of" differs
    assert studio.image("nobody's") is None


def test_previews_end_at_the_images(studio, monkeypatch):
    monkeypatch.setattr("microdit_jax.app.studio.PREVIEW_SHARE", 1e9)  # on a busy machine too
    studio.start()
    _, listener = ask(studio, count=3)
    names = listener.end()["images"]
    last_steps = [e for e in listener.events if e["event"] == "step" and e["step"] == 3]
    assert [event["together"] for event in last_steps] == [2, 1]
    for event in last_steps:
        for i, address in enumerate(event.get("previews", []), start=event["first"]):
            kept = studio.image(names[i]).png
            previewed = base64.b64decode(address.removeprefix("data:image/png;base64,"))
            with Image.open(io.BytesIO(kept)) as end, Image.open(io.BytesIO(previewed)) as shown:
                difference = np.asarray(end, np.int32) - np.asarray(shown, np.int32)
            assert np.abs(difference).max() <= 1, i
    assert "previews" in last_steps[-1]


def test_a_prompt_that_is_cut_is_warned_of(studio):
    studio.start()
    _, long = ask(studio, prompt="a b c d e f g h i j")
    _, short = ask(studio, prompt="a b")
    assert long.end()["event"] == short.end()["event"] == "done"
    warnings = [event["message"] for event in long.events if event["event"] == "warning"]
    assert warnings == ["the last 5 tokens of this prompt are cut: the model reads no more"]
    assert not [event for event in short.events if event["event"] == "warning"]


def test_a_word_that_the_model_cannot_know_is_warned_of(studio):
    studio.start()
    _, listener = ask(studio, prompt="A b, oboe b zither")
    assert listener.end()["event"] == "done"
    (warning,) = [e["message"] for e in listener.events if e["event"] == "warning"]
    assert warning.startswith("the last 3 tokens")  # beside the other warning
    assert warning.endswith(
        "; this model has seen no image of these words, which say nothing: oboe, zither"
    )


def test_a_job_that_runs_stops_when_it_is_cancelled(studio):
    class Impatient(Listener):
        def __call__(self, event):
            super().__call__(event)
            if event["event"] == "step":
                job.cancel()

    impatient = Impatient()
    job = studio.submit(read_request(GOOD | {"count": 3}, ["tiny"], LIMITS), impatient)
    _, after = ask(studio)
    studio.start()
    assert after.end()["event"] == "done"
    assert [event["event"] for event in impatient.events].count("step") == 1
    assert impatient.events[-1]["event"] == "step"


def test_one_failure_is_told_in_words_and_the_next_is_sampled(studio, monkeypatch, capsys):
    real, decode = type(studio.models["tiny"].pipe), "decode"
    working = real.decode
    monkeypatch.setattr(real, decode, lambda *_: 1 / 0)
    _, listener = ask(studio)
    studio.start()
    assert "the server's log says why" in listener.end()["message"]
    assert "ZeroDivisionError" in capsys.readouterr().err
    monkeypatch.setattr(real, decode, working)
    _, listener = ask(studio)
    assert listener.end()["event"] == "done"


def test_only_the_newest_images_are_kept(studio):
    studio.limits = Limits(kept_bytes=1)
    studio.start()
    _, listener = ask(studio, count=2)
    old, new = listener.end()["images"]
    assert studio.image(old) is None and studio.image(new) is not None


def test_an_image_is_changed_and_what_cannot_be_is_told_of(studio):
    studio.start()
    edit = {"image": data_url(), "strength": 1.0, "mask": data_url(white=10)}
    done = ask(studio, **edit, solver="ab3", num_inference_steps=4)[1].end()
    assert done["event"] == "done", done
    with Image.open(io.BytesIO(studio.image(done["images"][0]).png)) as image:
        settings = json.loads(image.text["microdit_jax"])
    assert settings["image"] == "sent to the web page" and settings["strength"] == 1.0
    assert settings["solver"] == "ab3" and len(settings["mask_sha256"]) == 64

    wrong = "data:image/png;base64," + base64.b64encode(b"no image").decode()
    told = ask(studio, image=wrong, strength=0.5)[1].end()
    assert told["message"] == "expected an image in the image, found not an image"
    small = {"image": data_url(), "mask": data_url(size=(3, 3), white=1), "strength": 1.0}
    told = ask(studio, **small)[1].end()
    assert "a mask of the image's size, 20x16, found 3x3" in told["message"]
