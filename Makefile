# Everything that sets calibatt up and runs it from a checkout. `make help` lists the targets.
#
#   PYTHON    Python to make the environment with (3.11 or newer)
#   VENV      where the environment goes
#   PIP_ARGS  more arguments for pip, such as another index for a build of torch that fits the GPU
#   TESTS     what `make test` runs, with any options of pytest
#   MINUTES   how long each file of tests/campaigns runs
#   CAMPAIGNS options for all of them, such as --out results --seed 7
#   WORKERS   how many tests run at a time
#   DEMO_ARGS options of `calibatt demo`

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PIP_ARGS ?=
TESTS ?= tests
WORKERS ?= 2
MINUTES ?= 5
CAMPAIGNS ?=
DEMO_ARGS ?=

BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
PINS := pyproject.toml constraints.txt
# A worker has a core of its own: more threads would only wait for one another.
PYTEST = OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -m pytest \
  --numprocesses=$(WORKERS) --dist=worksteal
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)

.PHONY: help demo test test-fast campaign lint format results clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    set up, then run the main job: calibrate, compile and compare the small video model"
	@echo "make test    set up, then check the code and run all tests"
	@echo "make test-fast  the same without what compiles or takes long"
	@echo "make campaign  run the random tests of tests/campaigns, MINUTES each"
	@echo "make lint    ruff and mypy only"
	@echo "make format  let ruff rewrite the files"
	@echo "make results write benchmarks/RESULTS.md and docs/performance.md from the records"
	@echo "make clean   remove the environment, caches and results"

demo: $(VENV)/.demo
	$(BIN)/calibatt demo $(DEMO_ARGS)

# Neighbouring tests share fixtures: stealing keeps them on one worker until the other is idle.
test: lint
	$(PYTEST) --durations=20 $(TESTS)

test-fast: lint
	$(PYTEST) -m 'not slow and not inductor' $(TESTS)

# All of them run, and it fails if one does.
campaign: $(VENV)/.dev
	@failed=; for file in tests/campaigns/*.py; do \
	  echo "$$file"; OMP_NUM_THREADS=1 $(BIN)/python $$file --minutes $(MINUTES) $(CAMPAIGNS) || failed="$$failed $$file"; \
	done; test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

results: $(VENV)/.dev
	$(BIN)/python benchmarks/results.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis calibatt-demo

# torch first and by itself: a range that it satisfies then downloads no second build.
$(VENV)/.torch: constraints.txt
	@$(if $(PYTHON),$(PYTHON) .ci/preflight.py,echo "calibatt: no python3 was found" >&2; exit 1)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(TORCH) setuptools
	@touch $@

# setuptools comes with torch, pinned: the package is built with that one, not with a fresh download.
$(VENV)/.demo: $(VENV)/.torch $(PINS)
	$(PIP_INSTALL) --no-build-isolation -e '.[report,pipelines]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch $(PINS)
	$(PIP_INSTALL) --no-build-isolation -e '.[dev]'
	@touch $@ $(VENV)/.demo
