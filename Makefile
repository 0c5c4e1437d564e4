# The whole vocabulary of the project: make serve, make test, make lint, make bench, make gpu, make audit,
# make bom.
SHELL  := /bin/bash
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: serve test lint bench gpu audit bom
.DELETE_ON_ERROR:

serve: $(VENV)/.serve
	@exec $(BIN)/fourstep serve $(ARGS)

test: $(VENV)/.test
	@$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.lint
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(VENV)/.test
	@$(BIN)/python -m loadtests $(ARGS)

gpu: $(VENV)/.test
	@$(BIN)/python -m loadtests gpu $(ARGS)

# Its outcome changes while the code does not, so it is part of neither lint nor test.
audit: $(VENV)/.audit
	@$(BIN)/python .ci/audit

bom: $(VENV)/.test
	@$(BIN)/python .ci/bom $(ARGS)

# Each stamp says which extra is installed, at which pins; editing the pins installs again.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"fourstep needs Python 3.11 or newer, this is {v.major}.{v.minor}: run make with PYTHON=/path/to/python3.11")'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: pyproject.toml deploy/constraints.txt | $(VENV)/bin/python
	@echo "Installing Fourstep into $(VENV) (about 1.5 GB, a few minutes the first time) ..."
	@$(PIP) -c deploy/constraints.txt -e .
	@touch $@

$(VENV)/.test: $(VENV)/.serve
	@echo "Installing what the tests need ..."
	@$(PIP) -c deploy/constraints.txt -e '.[test]'
	@touch $@

$(VENV)/.lint: $(VENV)/.serve
	@$(PIP) -c deploy/constraints.txt -e '.[lint]'
	@touch $@

$(VENV)/.audit: pyproject.toml deploy/constraints.txt | $(VENV)/bin/python
	@$(PIP) -c deploy/constraints.txt pip-audit
	@touch $@
