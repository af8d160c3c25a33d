"""The built docs site in a browser: its search answers, tables fit, formulas are typeset.

Needs site/ (`make docs`) and Chromium; `make test-docs` has both.
"""

import functools
import http.server
import pathlib
import threading
import time

import pytest

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By  # noqa: E402

SITE = pathlib.Path(__file__).parents[2] / "site"
PAGES = sorted(path.name for path in SITE.glob("*.html"))
pytestmark = pytest.mark.skipif(not PAGES, reason="no site/: make docs")

# The page that answers, for what a reader types. Below the line: words that must find something.
ANSWERS = {
    "EDM loss": "how-it-works.html",
    "where the mask acts": "how-it-works.html",
    "add an attention kernel": "contributing.html",
    "own data": "data.html",
    "convert": "converting.html",
    "resume": "training.html",
    "mesh for 16 GPUs": "scaling.html",
    "which solver": "sampling.html",
    "memory on 24 GB": ("gpu.html", "troubleshooting.html"),
    "what is exact": "parity.html",
    # ---
    "own pictures": "finetune.html",
    "fine-tune": "finetune.html",
    "negative prompt": "sampling.html",
    "troubleshooting": "troubleshooting.html",
    "citation": "cite.html",
}
HITS = """
const roots = [document], found = [];
while (roots.length) {
  const root = roots.pop();
  for (const element of root.querySelectorAll('*')) {
    if (element.shadowRoot) roots.push(element.shadowRoot);
    if (root !== document && element.matches('a[href*="?h="]')) found.push(element.href);
  }
}
return found;
"""
TOO_WIDE = """
const column = document.querySelector('.md-content__inner').clientWidth;
return [...document.querySelectorAll('.md-content table')]
  .filter(table => table.scrollWidth > column).map(table => table.rows[0].innerText);
"""


@pytest.fixture(scope="module")
def base():
    handler = functools.partial(QuietHandler, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


@pytest.fixture(scope="module")
def driver():
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options)
    driver.set_window_size(1280, 900)
    yield driver
    driver.quit()


@pytest.mark.parametrize("question", ANSWERS)
def test_search_answers_within_three_hits(driver, base, question):
    driver.get(f"{base}/index.html")
    driver.find_element(By.CSS_SELECTOR, ".md-search__button").click()
    time.sleep(1)  # the dialog takes the keys once it is open
    webdriver.ActionChains(driver).send_keys(question).perform()
    hits = []
    for _ in range(60):
        before, hits = hits, driver.execute_script(HITS)
        if hits and hits == before:
            break
        time.sleep(0.5)
    pages = [hit.removeprefix(f"{base}/").partition("?")[0] for hit in hits]
    wanted = ANSWERS[question]
    wanted = {wanted} if isinstance(wanted, str) else set(wanted)  # either page answers
    assert wanted & set(pages[:3]), pages[:6]


@pytest.mark.parametrize("page", PAGES)
def test_tables_fit_and_formulas_are_typeset(driver, base, page):
    driver.set_window_size(1280, 900)
    driver.get(f"{base}/{page}")
    assert driver.execute_script(TOO_WIDE) == []
    assert driver.execute_script("return document.querySelectorAll('.arithmatex').length") == 0


def test_phones_get_the_narrow_figures(driver, base):
    driver.set_window_size(500, 900)  # Chromium's narrowest
    driver.get(f"{base}/how-it-works.html")
    shown = [image.get_property("currentSrc") for image in driver.find_elements(By.TAG_NAME, "img")]
    names = {source.rpartition("/")[2] for source in shown}
    assert {"method-narrow.svg", "experts-narrow.svg", "flops-narrow.svg"} <= names
