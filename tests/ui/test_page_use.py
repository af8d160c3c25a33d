"""How people use the page: on phones, in two tabs, by the keyboard, on bad networks."""

import io
import json
import time
import urllib.request
import zipfile

from conftest import serving
from pages import WAIT, complaints, ended, fill, finished, press, sample, stage, text
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

PHONE = {"deviceMetrics": {"width": 375, "height": 667, "pixelRatio": 2.0, "touch": True}}


def wait(page, what):
    return WebDriverWait(page, WAIT, poll_frequency=0.05).until(what)


def gallery(page) -> list[str]:
    found = page.find_elements(By.CSS_SELECTOR, "#gallery img")
    return [image.get_attribute("src") for image in found]


def value(page, name: str) -> str:
    return page.find_element(By.ID, name).get_property("value")


def focused(page) -> str:
    return page.execute_script(
        "return document.activeElement.id || document.activeElement.className"
    )


def test_on_a_phone_the_image_comes_into_view(browser):
    page = browser(mobileEmulation=PHONE)
    wide = page.execute_script("return document.documentElement.scrollWidth - innerWidth")
    assert wide <= 0  # nothing to scroll sideways
    sample(page, prompt="red apple", steps=2, seed=1)
    box = page.execute_script(
        "const r = document.querySelector('#stage img').getBoundingClientRect();"
        "return [r.top, r.bottom, innerHeight]"
    )
    assert 0 <= box[0] and box[1] <= box[2], box
    page.find_element(By.CSS_SELECTOR, "#stage .image").click()
    wide = page.execute_script(
        "return document.querySelector('dialog').getBoundingClientRect().width"
    )
    assert wide <= 375
    assert not complaints(page)


def test_two_tabs_share_a_gallery(browser):
    page = browser()
    first = page.current_window_handle
    page.switch_to.new_window("tab")
    page.get(page_address(page, first))
    second = page.current_window_handle
    sample(page, prompt="cat face", steps=1, seed=1)
    page.switch_to.window(first)
    wait(page, lambda page: len(gallery(page)) == 1)  # seen without a reload
    sample(page, prompt="red apple", steps=1, seed=1)
    assert len(gallery(page)) == 2
    page.switch_to.window(second)
    wait(page, lambda page: len(gallery(page)) == 2)
    page.refresh()
    wait(page, lambda page: len(gallery(page)) == 2)


def page_address(page, window: str) -> str:
    here = page.current_window_handle
    page.switch_to.window(window)
    address = page.current_url
    page.switch_to.window(here)
    return address


def test_by_the_keyboard_alone(browser):
    page = browser()
    fill(page, steps=1, seed=1)
    page.find_element(By.ID, "prompt").click()
    keys = lambda *these: ActionChains(page).send_keys(*these).perform()  # noqa: E731
    keys("red apple", Keys.ENTER)
    finished(page)
    assert focused(page) == "prompt"
    # To the button, which keeps the focus while it works and afterwards.
    page.execute_script("document.getElementById('sample').focus()")
    keys(Keys.SPACE)
    finished(page)
    assert focused(page) == "sample"
    keys(Keys.TAB)
    while focused(page) != "image":
        keys(Keys.TAB)
    keys(Keys.ENTER)
    wait(page, lambda page: page.find_element(By.ID, "details-prompt").is_displayed())
    keys(Keys.ESCAPE)
    wait(page, lambda page: not page.find_element(By.ID, "details-prompt").is_displayed())
    assert focused(page) == "image"
    # An example that is chosen stays the focus's place.
    example = page.find_element(By.CSS_SELECTOR, "#examples button")
    page.execute_script("arguments[0].focus()", example)
    keys(Keys.ENTER)
    assert value(page, "prompt") == example.text
    assert page.execute_script("return document.activeElement") == example
    assert not complaints(page)


def test_a_reload_keeps_the_form_and_the_request(browser):
    page = browser()
    fill(page, prompt="dog face", steps=300, count=2, seed=5)
    press(page)
    wait(page, lambda page: "step" in text(page, "state"))
    page.refresh()
    wait(page, lambda page: "step" in text(page, "state"))
    assert (value(page, "prompt"), value(page, "seed")) == ("dog face", "5")
    reloaded = finished(page)
    assert len(gallery(page)) == 2
    page.refresh()
    assert value(page, "prompt") == "dog face" and ended(page)
    assert sample(page, prompt="dog face", steps=300, count=2, seed=5) == reloaded


def test_a_request_may_outlive_its_page(browser):
    page = browser()
    stays = page.current_window_handle
    page.switch_to.new_window("tab")
    page.get(page_address(page, stays))
    fill(page, prompt="cat face", steps=200, seed=3)
    page.find_element(By.ID, "keep").click()
    press(page)
    wait(page, lambda page: "step" in text(page, "state"))
    page.close()
    page.switch_to.window(stays)
    time.sleep(1)
    assert not gallery(page)
    page.refresh()
    wait(page, lambda page: len(gallery(page)) == 1)
    assert text(page, "details-prompt") == ""
    page.refresh()
    wait(page, ended)
    assert len(gallery(page)) == 1  # told once


def test_back_closes_the_dialog_and_links_carry_settings(browser):
    page = browser()
    address = page.current_url
    (made,) = sample(page, prompt="cat & dog", steps=3, seed=7)
    page.find_element(By.CSS_SELECTOR, "#gallery .image").click()
    page.execute_script(
        "const writeText = (text) => { window.copied = text; };"
        "Object.defineProperty(navigator, 'clipboard', {value: {writeText}})"
    )
    page.find_element(By.ID, "copy").click()
    link = wait(page, lambda page: page.execute_script("return window.copied"))
    page.back()
    wait(page, lambda page: not page.find_element(By.ID, "details-prompt").is_displayed())
    assert page.current_url == address
    other = browser()
    other.get(link)
    assert (value(other, "prompt"), value(other, "seed")) == ("cat & dog", "7")
    kept = other.find_element(By.ID, "new-seed")
    kept.click()
    press(other)
    assert finished(other) == [made]


def test_seeds_are_random_until_one_is_kept(browser):
    one, two = browser(), browser()
    seeds = {value(one, "seed"), value(two, "seed")}
    assert len(seeds) == 2 and "" not in seeds
    one.find_element(By.ID, "prompt").send_keys("red apple")
    press(one)
    finished(one)
    assert value(one, "seed") not in seeds


def test_delete_one_download_all_and_clear_asks(browser):
    page = browser()
    made = [
        *sample(page, prompt="яблоко", steps=1, seed=1),
        *sample(page, seed=2),
        *sample(page, seed=3),
    ]
    figures = page.find_elements(By.CSS_SELECTOR, "#gallery .image")
    figures[0].click()  # the newest
    page.find_element(By.ID, "delete").click()
    wait(page, lambda page: len(gallery(page)) == 2)
    page.execute_script(
        "const made = URL.createObjectURL;"
        "URL.createObjectURL = (blob) => { window.blob = blob; return made(blob); }"
    )
    page.find_element(By.ID, "download-all").click()
    wait(page, lambda page: page.execute_script("return Boolean(window.blob)"))
    data = page.execute_async_script(
        "const done = arguments[0];"
        "window.blob.arrayBuffer().then((b) => done([...new Uint8Array(b)]))"
    )
    with zipfile.ZipFile(io.BytesIO(bytes(data))) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert names == ["0000_яблоко.png", "0000_яблоко_2.png"]
        assert [archive.read(name) for name in names] == [made[1], made[0]]
    page.find_element(By.ID, "clear").click()
    page.switch_to.alert.dismiss()
    assert len(gallery(page)) == 2
    page.find_element(By.ID, "clear").click()
    page.switch_to.alert.accept()
    wait(page, lambda page: not gallery(page))
    assert not complaints(page)


def test_small_images_are_shown_pixel_by_pixel(browser):
    page = browser()
    sample(page, prompt="red apple", steps=1)
    image = page.find_element(By.CSS_SELECTOR, "#stage img")
    wait(page, lambda _: image.value_of_css_property("image-rendering") == "pixelated")


def test_the_server_is_started_again(browser, models, tmp_path):
    with serving(models, tmp_path / "log") as address:
        page = browser(address)
        sample(page, prompt="red apple", steps=1, seed=1)
        fill(page, steps=300, count=8)
        press(page)
        wait(page, lambda page: "step" in text(page, "state"))
    port = int(address.rstrip("/").rpartition(":")[2])
    wait(page, lambda page: "trying again" in text(page, "state"))
    with serving(models, tmp_path / "log2", port):
        wait(page, ended)
        assert "no longer known; send it again" in text(page, "error")
        assert len(sample(page, steps=1, count=1)) == 1  # without a reload
        assert stage(page)


def test_requests_of_a_page_that_never_came_back_are_cancelled(browser, address):
    body = {
        "model": json.load(urllib.request.urlopen(address + "choices"))["models"][0]["name"],
        "prompt": "a", "guidance_scale": 2, "num_inference_steps": 300, "seed": 1, "count": 8,
    }  # fmt: skip
    request = urllib.request.Request(
        address + "sample", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        name = json.loads(answer.readline())["id"]
    with urllib.request.urlopen(f"{address}jobs/{name}") as again:  # it is still there
        assert json.loads(again.readline())["id"] == name
    ask = urllib.request.Request(f"{address}jobs/{name}", method="DELETE")
    assert urllib.request.urlopen(ask).status == 204
    with urllib.request.urlopen(f"{address}jobs/{name}") as ended_now:
        assert json.loads(ended_now.read().splitlines()[-1])["message"] == "stopped"
