# Everything starts from a bare machine with python3 (3.11 or later) and make. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
LATEST_VENV ?= .venv-latest
TPU_VENV ?= .venv-tpu
PYTHON ?= $(shell .ci/find-python 3.11 3.12 3.13 2>/dev/null)
LATEST_PYTHON ?= $(shell .ci/find-python 3.13 3.12 2>/dev/null)
WORKERS ?= $(shell cores=$$(nproc); echo $$(( cores < 8 ? cores : 8 )))
ARGS ?=
# Compiles for TPUs that are not here; every kernel x chip x shape takes hours: make test-tpu TPU_TESTS=tests/pallas_kernels
TPU_TESTS ?= tests/planning/test_plan.py tests/planning/test_topologies.py

PIP := -m pip install --quiet --progress-bar off --disable-pip-version-check
# The pinned set of a lane: torch and transformers are in the one for Python 3.11 only.
CONSTRAINTS = $$($(1)/bin/python -c 'import sys; print("requirements/%s.txt" % ("py311" if sys.version_info < (3, 12) else "latest"))')
PINS := pyproject.toml requirements/py311.txt requirements/latest.txt requirements/tpu.txt

.PHONY: help demo test test-slow test-latest test-tpu lint format bench clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

demo: $(VENV)/.demo ## train a small K-EXAONE on this machine, write a checkpoint, read it back, complete code
	$(VENV)/bin/python scripts/demo.py $(ARGS)

test: $(VENV)/.test ## the suite; ARGS="tests/model -k rope" narrows it
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-slow: $(VENV)/.test ## the suite with the tests that take minutes or gigabytes
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile -m "slow or not slow" $(ARGS)

test-latest: $(LATEST_VENV)/.test ## the suite on the newest Python and jax found here, without torch
	$(LATEST_VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-tpu: $(TPU_VENV)/.test ## compiles for TPU slices that are not here, with libtpu (220 MB to download) in an environment of its own
	JAX_PLATFORMS=cpu $(TPU_VENV)/bin/python -m pytest tests/pallas_kernels/test_tpu_compiles.py tests/training/test_narrow_compiles.py $(ARGS)
	JAX_PLATFORMS=cpu $(TPU_VENV)/bin/python -m pytest -m slow $(TPU_TESTS) $(ARGS)

lint: $(VENV)/.dev ## ruff and the type checker
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyrefly check --python-interpreter-path $(VENV)/bin/python

format: $(VENV)/.dev ## put the code into ruff's form
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

bench: ## how to run the benchmarks (each prints a table; none runs in the suite)
	@echo "Install what they compare with:  make $(VENV)/.test"
	@for script in $$(grep -l __main__ benchmarks/*.py); do echo "  $(VENV)/bin/python $$script"; done

clean: ## remove the environments and what tools leave
	rm -rf $(VENV) $(LATEST_VENV) $(TPU_VENV) build dist demo-output .cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp a set of extras; the larger sets contain the smaller.
$(VENV)/.demo: $(VENV)/.python $(PINS)
	@echo "installing '.[demo]' into $(VENV) (a minute or two)"
	@$(VENV)/bin/python $(PIP) -c $(call CONSTRAINTS,$(VENV)) -e '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.python $(PINS)
	@echo "installing '.[test]' into $(VENV) (a minute or two)"
	@$(VENV)/bin/python $(PIP) -c $(call CONSTRAINTS,$(VENV)) -e '.[test]'
	@touch $(VENV)/.demo $@

$(VENV)/.dev: $(VENV)/.python $(PINS)
	@echo "installing '.[dev]' into $(VENV) (a minute or two)"
	@$(VENV)/bin/python $(PIP) -c $(call CONSTRAINTS,$(VENV)) -e '.[dev]'
	@touch $(VENV)/.demo $(VENV)/.test $@

$(LATEST_VENV)/.test: $(LATEST_VENV)/.python $(PINS)
	@echo "installing '.[test]' into $(LATEST_VENV) (a minute or two)"
	@$(LATEST_VENV)/bin/python $(PIP) -c $(call CONSTRAINTS,$(LATEST_VENV)) -e '.[test]'
	@touch $@

$(TPU_VENV)/.test: $(TPU_VENV)/.python $(PINS)
	@echo "installing '.[test,tpu]' into $(TPU_VENV) (a minute or two)"
	@$(TPU_VENV)/bin/python $(PIP) -c requirements/tpu.txt -e '.[test,tpu]'
	@touch $@

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "exaone-jax needs Python 3.11 or later (make PYTHON=/path/to/python)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip' || { echo "$(PYTHON) cannot make virtual environments: on Debian, apt-get install python3-venv" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	@touch $@

$(LATEST_VENV)/.python $(TPU_VENV)/.python:
	@test -n "$(LATEST_PYTHON)" || { echo "no Python 3.12 or 3.13 found (make LATEST_PYTHON=/path/to/python)" >&2; exit 1; }
	"$(LATEST_PYTHON)" -m venv $(@D)
	@touch $@
