# `make serve` and `make test` need nothing but Python 3.11+ and make.
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: check lint types test format

$(VENV)/.installed: pyproject.toml
	python3 -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip
	$(PY) -m pip install -q torch==2.13.0
	$(PY) -m pip install -q -e '.[cpu,hf,dev]'
	touch $@

check: lint types test

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check src tests
	$(VENV)/bin/ruff format --check src tests

types: $(VENV)/.installed
	$(VENV)/bin/pyright

test: $(VENV)/.installed
	$(PY) -m pytest

format: $(VENV)/.installed
	$(VENV)/bin/ruff format src tests
	$(VENV)/bin/ruff check --fix src tests
