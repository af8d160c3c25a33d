"""The page in a real browser: make test-ui."""

import base64
import http.client
import json
import os
import pathlib
import subprocess
import sys
import urllib.parse
import urllib.request

import pytest
from pages import (
    WAIT,
    complaints,
    ended,
    fill,
    finished,
    images,
    loaded,
    press,
    sample,
    stage,
    text,
)
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

from microdit_jax.images import read_png, read_settings

ROOT = pathlib.Path(__file__).parent.parent.parent


def test_a_prompt_an_image_another_seed_another_and_the_same_again(browser):
    page = browser()
    assert not stage(page)
    (first,) = sample(page, prompt="red apple", steps=4, seed=1)
    (other,) = sample(page, seed=2)
    (again,) = sample(page, seed=1)
    assert first != other and first == again
    (words,) = sample(page, prompt="hot pepper")
    assert words != first
    # Enter samples too; the dice gives another seed.
    page.find_element(By.ID, "dice").click()
    assert page.find_element(By.ID, "seed").get_property("value") not in ("", "1")
    page.find_element(By.ID, "prompt").send_keys("\n")
    assert finished(page) != [words]
    assert len(page.find_elements(By.CSS_SELECTOR, "#gallery figure")) == 5
    assert not complaints(page)


def test_several_images_with_previews_and_the_other_model(browser):
    page = browser()
    fill(page, prompt="dog face", steps=100, count=5)
    page.execute_script("""
        window.seen = [];
        new MutationObserver((changes) => changes.forEach(({ target }) => {
          if (target.src) window.seen.push(target.src);
        })).observe(document.getElementById("stage"), { subtree: true, attributeFilter: ["src"] });
        """)
    press(page)
    first = finished(page)
    assert len(set(first)) == 5
    shown = page.execute_script("return window.seen")
    previews = [address for address in shown if address.startswith("data:image/png")]
    assert len(set(previews)) > 5, len(previews)  # the denoising was to be seen
    assert base64.b64decode(previews[0].split(",")[1]).startswith(b"\x89PNG")
    models = Select(page.find_element(By.ID, "model"))
    names = [option.text for option in models.options]
    assert [name.split("/")[1] for name in names] == ["first", "second"]
    models.select_by_index(1)
    second = sample(page)
    assert len(set(first + second)) == 10


def test_two_users_at_once(browser):
    one, two = browser(), browser()
    alone = sample(two, prompt="red apple", steps=3, seed=5)
    fill(one, prompt="cat face", steps=100, count=8)
    fill(two, prompt="red apple", steps=3, seed=5)
    press(one)
    WebDriverWait(one, WAIT, poll_frequency=0.05).until(lambda page: "step" in text(page, "state"))
    press(two)
    # The second waits for the first, is told so, and then gets its own image.
    WebDriverWait(two, WAIT, poll_frequency=0.02).until(
        lambda page: text(page, "state") == "1 before you"
    )
    assert not ended(one)
    assert finished(two) == alone
    assert len(set(finished(one))) == 8
    assert len(one.find_elements(By.CSS_SELECTOR, "#gallery figure")) == 8  # not the other's
    assert len(two.find_elements(By.CSS_SELECTOR, "#gallery figure")) == 2


def test_stop_and_a_closed_page_free_the_queue(browser):
    page, closed = browser(), browser()
    for user in (page, closed):
        fill(user, prompt="a", steps=300, count=8)
        press(user)
    WebDriverWait(page, WAIT, poll_frequency=0.05).until(lambda page: "step" in text(page, "state"))
    closed.close()
    page.find_element(By.ID, "stop").click()
    WebDriverWait(page, WAIT).until(ended)
    assert text(page, "state") == "stopped" and not text(page, "error")
    sample(page, steps=1, count=1)


def test_bad_input_is_answered_in_words_and_the_next_is_sampled(browser):
    page = browser()
    good = {"prompt": "red apple", "steps": 2, "count": 1, "seed": 1}
    for values, words in (
        ({"prompt": "  "}, "expected a prompt, found an empty one; say what to show"),
        ({"prompt": "apple " * 40}, "at most 200 characters, found 239; shorten it"),
        ({"steps": 0}, "steps as a whole number from 1 to 300, found 0"),
        ({"steps": 301}, "found 301"),
        ({"steps": 2.5}, "found 2.5"),
        ({"steps": ""}, "found nothing"),
        ({"count": 9}, "images as a whole number from 1 to 8, found 9"),
        ({"seed": -1}, "a seed as a whole number from 0 to 4294967295, found -1"),
    ):
        fill(page, **good | values)
        press(page)
        WebDriverWait(page, WAIT).until(ended)
        assert words in text(page, "error")
        sample(page, **good)
        assert not text(page, "error")
    assert not complaints(page)


def test_a_solver_a_negative_prompt_and_an_image_to_change(browser, tmp_path):
    page = browser()
    (plain,) = sample(page, prompt="red apple", steps=4, seed=1)
    page.find_element(By.CSS_SELECTOR, "#more > summary").click()
    Select(page.find_element(By.ID, "solver")).select_by_value("ab3")
    assert page.find_element(By.ID, "steps").get_property("value") == "16"  # the solver's own
    (other,) = sample(page, steps=4, negative="dog face")
    assert other != plain

    given = tmp_path / "given.png"
    Image.new("RGB", (50, 40), "orange").save(given)
    page.find_element(By.ID, "image-file").send_keys(str(given))
    canvas = page.find_element(By.ID, "edit-canvas")
    WebDriverWait(page, WAIT).until(lambda _: canvas.is_displayed())
    (changed,) = sample(page)
    ActionChains(page).click_and_hold(canvas).move_by_offset(40, 0).release().perform()
    WebDriverWait(page, WAIT).until(
        lambda page: page.find_element(By.ID, "mask-clear").is_displayed()
    )
    (painted,) = sample(page)
    assert len({plain, other, changed, painted}) == 4
    (tmp_path / "painted.png").write_bytes(painted)
    settings = read_settings(tmp_path / "painted.png")
    asked = ("ab3", "dog face", 0.6, "sent to the web page", "sent to the web page")
    found = ("solver", "negative_prompt", "strength", "image", "mask")
    assert tuple(settings[name] for name in found) == asked
    page.find_element(By.ID, "image-remove").click()
    assert sample(page) == [other]
    assert not complaints(page)


def test_a_prompt_is_shown_as_text_and_a_long_one_with_a_warning(browser):
    page = browser()
    prompt = "<img src=x onerror=alert(1)> " + "red apple " * 12
    sample(page, prompt=prompt, steps=1)
    assert "tokens of this prompt are cut" in text(page, "warning")
    assert page.find_element(By.CSS_SELECTOR, "figcaption").text.startswith("<img src=x")
    assert not page.find_elements(By.CSS_SELECTOR, "figcaption img")


def test_gallery_again_and_download(browser, models, tmp_path):
    page = browser()
    (made,) = sample(page, prompt="red apple", steps=4, seed=7)
    page.refresh()
    WebDriverWait(page, WAIT).until(lambda page: [*map(loaded, images(page))] == [True])
    page.find_element(By.CSS_SELECTOR, "#gallery .image").click()
    settings = text(page, "details-settings").split("\n")
    assert (
        dict(zip(settings[::2], settings[1::2], strict=True)).items()
        >= {
            "Seed": "7",
            "Steps": "4",
            "Image": "1 of 1",
        }.items()
    )
    link = page.find_element(By.ID, "download")
    assert link.get_attribute("download") is not None
    with urllib.request.urlopen(link.get_attribute("href")) as answer:
        named = 'inline; filename="0000_red-apple.png"'
        assert answer.headers["Content-Disposition"].startswith(named)
        (tmp_path / "made.png").write_bytes(answer.read())
    page.find_element(By.ID, "again").click()
    assert finished(page) == [made] == [(tmp_path / "made.png").read_bytes()]

    # The PNG says all that sample_main.py needs to sample it again, but for the models' folder.
    shown = "/".join(pathlib.Path(models[0]).parts[-2:])
    assert read_settings(tmp_path / "made.png")["model"] == shown
    command = ["sample_main.py", f"--again={tmp_path / 'made.png'}", f"--model={models[0]}"]
    command.append(f"--out={tmp_path}")
    environment = os.environ | {"XLA_FLAGS": ""}
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True)
    found = read_png(tmp_path / "images" / "0000_red-apple.png")
    assert abs(found - read_png(tmp_path / "made.png")).max() <= 1.5 / 255


GOOD = {
    "model": "", "prompt": "a", "guidance_scale": 2, "num_inference_steps": 1, "seed": 1,
    "count": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    "method, path, body, headers, status",
    [
        ("POST", "/sample", GOOD | {"model": "../../etc/passwd"}, {}, 400),
        ("POST", "/sample", GOOD | {"prompt": "x" * 6_000_000}, {}, 413),
        ("POST", "/sample", [[[]]], {}, 400),
        ("POST", "/sample", GOOD, {"Content-Type": "text/plain"}, 415),  # another site's form
        ("GET", "/sample", None, {}, 405),
        ("GET", "/choices", None, {"Host": "evil.example"}, 400),  # another site's name
        ("GET", "/../../../etc/passwd", None, {}, 404),
        ("GET", "/images/..%2f..%2fserver.py", None, {}, 404),
        ("GET", "/page/index.html", None, {}, 404),
        ("GET", "/choices", None, {}, 200),
    ],
)
def test_what_the_server_answers(address, method, path, body, headers, status):
    place = urllib.parse.urlsplit(address)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=WAIT)
    content = None if body is None else json.dumps(body)
    connection.request(method, path, content, {"Content-Type": "application/json"} | headers)
    answer = connection.getresponse()
    assert answer.status == status, answer.read()
    said = answer.read().decode()
    assert "/tmp" not in said and "root:" not in said
    connection.close()
