"""Steps of the browser tests on the page."""

import urllib.request

from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

WAIT = 120  # seconds; a request takes one or two


def fill(page, **values) -> None:
    kept = page.find_element(By.ID, "new-seed")
    if kept.is_selected():  # or the next request has another seed
        kept.click()
    for name, value in values.items():
        field = page.find_element(By.ID, name)
        field.clear()
        field.send_keys(str(value))


def press(page) -> None:
    page.find_element(By.ID, "sample").click()


def text(page, name: str) -> str:
    return page.find_element(By.ID, name).text


def ended(page) -> bool:
    return page.find_element(By.ID, "sample").get_attribute("aria-disabled") != "true"


def stage(page) -> list[str]:
    """Addresses of the newest images."""
    return [i.get_attribute("src") for i in page.find_elements(By.CSS_SELECTOR, "#stage img")]


def finished(page) -> list[bytes]:
    """The PNGs of the request that was begun, once it is done."""
    WebDriverWait(page, WAIT).until(ended)
    assert " in " in text(page, "state"), text(page, "error")
    WebDriverWait(page, WAIT).until(lambda page: all(map(loaded, images(page))))
    return [urllib.request.urlopen(address).read() for address in stage(page)]


def images(page) -> list:
    return page.find_elements(By.CSS_SELECTOR, "#stage img, #gallery img")


def loaded(image) -> bool:
    return image.get_property("complete") and image.get_property("naturalWidth") == 32


def sample(page, **values) -> list[bytes]:
    fill(page, **values)
    press(page)
    return finished(page)


def complaints(page) -> list[str]:
    """Messages in the browser's console, but for refused requests."""
    log = page.get_log("browser")
    return [entry["message"] for entry in log if entry["source"] != "network"]
