"""A server with two tiny models in a process of its own, and headless browsers to use it."""

import contextlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

TESTS = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(TESTS))  # support


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> list[str]:
    """Two training runs of a step or two: their images are noise, but each its own."""
    from support.tiny_config import get_config

    from microdit_jax.train import train

    folder = tmp_path_factory.mktemp("models")
    for steps, name in enumerate(("first", "second"), start=1):
        config = get_config(str(folder / "data"))
        config.train.steps = steps
        train(config, folder / name)
    return [str(folder / "first"), str(folder / "second")]


@contextlib.contextmanager
def serving(models, log: pathlib.Path, port: int = 0):
    """Serves the page in a process of its own; gives its address."""
    flags = [f"--model={model}" for model in models] + ["--max_prompt=200", "--max_steps=300"]
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "microdit_jax.app", *flags, f"--port={port}"],
            cwd=TESTS.parent,
            env=os.environ | {"XLA_FLAGS": ""},  # one device, as on most machines
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        until = time.monotonic() + 300
        while not (found := re.search(r"Open (http://\S+)", log.read_text())):
            assert server.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        yield found[1]
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="session")
def address(models, tmp_path_factory):
    """Where the page is served."""
    with serving(models, tmp_path_factory.mktemp("server") / "log") as found:
        yield found


@pytest.fixture
def browser(address):
    """Opens the page as one more user: each has storage of its own."""
    opened = []

    def open_page(address=address, **capabilities):
        options = webdriver.ChromeOptions()
        # Containers have no user namespaces for the sandbox, and little shared memory.
        for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1360,900"):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        for name, value in capabilities.items():
            options.add_experimental_option(name, value)
        driver = shutil.which("chromedriver")  # of the system; else Selenium fetches a pair
        page = webdriver.Chrome(options, Service(driver) if driver else None)
        opened.append(page)
        page.get(address)
        return page

    yield open_page
    for page in opened:
        page.quit()
