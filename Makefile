# `make demo` and `make test` set everything up in .venv first.
PYTHON ?= python3
BIN := .venv/bin
DEMO := out/demo

.PHONY: demo test test-ui docs lint setup clean
setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"Python 3.11 or 3.12 is needed, found {v[0]}.{v[1]}; run make PYTHON=python3.12" if not (3, 11) <= v[:2] <= (3, 12) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install -qq --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup  ## train a small MicroDiT from scratch, two stages, and draw what it was not shown
	$(BIN)/python train_main.py --config=configs/demo.py --workdir=$(DEMO)
	$(BIN)/python sample_main.py --model=$(DEMO)/finetune --heldout=24 --guidance_scale=3 --out=$(DEMO)
	$(BIN)/python -m microdit_jax.evaluate --model=$(DEMO)/finetune --num_images=500 --guidance_scale=3 --num_inference_steps=12 --out=$(DEMO)/evaluate
	@echo "Look at $(DEMO)/samples.png: each real picture stands left of a sample of its caption."

test: setup  ## all tests, on eight simulated CPU devices
	$(BIN)/python -m pytest -q -n 2 --dist=worksteal --durations=10

test-ui: setup  ## the web page in a headless Chromium; not part of `make test`, which needs no browser
	$(BIN)/pip install -qq --constraint constraints.txt --editable '.[dev,ui,ui-test]'
	@command -v chromedriver >/dev/null || apt-get install -y -qq chromium chromium-driver \
		|| echo "No chromedriver, and no right to install one: Selenium tries to fetch a browser."
	$(BIN)/python -m pytest -q tests/ui --durations=5

docs: setup  ## the docs site in site/, open site/index.html; a warning is an error
	$(BIN)/pip install -qq --constraint constraints.txt --editable '.[dev,docs]'
	$(BIN)/python tools/api_pages.py
	$(BIN)/zensical build --strict --clean

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf out site .venv
