# `make serve` and `make test` need Python 3.11 or newer and make, nothing else.
# `make` alone lists the targets.

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# What is served, on how many ranks, where, and with which plan. `make serve RANKS=4 PORT=9000`
MODEL ?= demo
RANKS ?= 2
PORT ?= 8000
PLAN ?=
DEMO_RANKS ?= 4

# The first interpreter that runs and is new enough; `make serve PYTHON=/path/to/python` overrides.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# Installed before the rest so that this build is the one the others find. On Linux the default
# build carries CUDA, several gigabytes that a CPU has no use for. PyTorch publishes a CPU build
# (2.13.0+cpu) in an index of its own: name that index in PIP_EXTRA_INDEX_URL and it is preferred.
TORCH ?= torch==2.13.0

# Clients of other projects live in an environment of their own: their pins are not ours.
CLIENTS := .venv-clients
# So does Nitsum with its core compiled; it borrows the other packages of $(VENV).
COMPILED := .venv-compiled
AS_ROOT := $(if $(filter 0,$(shell id -u)),,sudo)

.DEFAULT_GOAL := help
.PHONY: help serve demo compiled test test-alone test-processes test-gpu test-browser test-clients prove browser database check lint types format clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' Makefile

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found; install it, or name it: make PYTHON=/path/to/python3"; exit 1; }
	@echo "Creating the environment in $(VENV); the first time, this takes a few minutes."
	@$(PYTHON) -m venv $(VENV) || { echo "python -m venv failed; on Debian and Ubuntu, install python3-venv."; exit 1; }
	$(PY) -m pip install --quiet --no-compile "$(TORCH)"
	$(PY) -m pip install --quiet --no-compile -e '.[cpu,hf,dev]'
	@# Half of an installation is compiling, which pip does on one core. Like pip, this passes over
	@# templates that are no Python.
	@$(PY) -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@

serve: $(STAMP) ## Fetch the demo model and serve it (MODEL, RANKS, PORT, PLAN)
	@$(VENV)/bin/nitsum serve $(MODEL) --ranks $(RANKS) --port $(PORT) $(if $(PLAN),--plan '$(PLAN)')

demo: $(STAMP) ## Watch chats stream while the layout changes under them (MODEL, DEMO_RANKS)
	@$(VENV)/bin/nitsum demo $(MODEL) --ranks $(DEMO_RANKS)

compiled: $(COMPILED)/.installed ## Build Nitsum with its deciding core as machine code (needs a C compiler)
	@$(COMPILED)/bin/nitsum version
	@echo "Run $(COMPILED)/bin/nitsum in place of $(VENV)/bin/nitsum, and make compiled again after a change."

# A copy, since what is compiled must not lie beside sources that change: it would be run.
$(COMPILED)/.installed: $(STAMP) pyproject.toml setup.py deploy/wheel/core_build.py $(shell find src/nitsum -type f -not -path '*/__pycache__/*')
	@echo "Compiling takes two to three minutes."
	@rm -rf build $(COMPILED)
	@$(PY) -m venv --without-pip $(COMPILED)
	@$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(echo $(COMPILED)/lib/python*/site-packages)/borrowed.pth
	NITSUM_COMPILE=1 $(PY) -m pip --python $(COMPILED)/bin/python install --quiet --no-deps .
	@rm -rf build
	@touch $@

test: test-alone test-processes ## Run the tests

test-alone: export OMP_NUM_THREADS := 1
test-alone: $(STAMP) ## Run the tests that start no server and no workers
	$(PY) -m pytest -m "not gpu and not browser and not processes and not fault"

test-processes: $(STAMP) ## Run the tests that start servers and workers
	$(PY) -m pytest -m "not gpu and not browser and (processes or fault)"

browser: ## Install Chromium and its driver (Debian, Ubuntu) where they are missing
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
		$(AS_ROOT) apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive $(AS_ROOT) apt-get install -y -qq --no-install-recommends \
			chromium chromium-driver fonts-dejavu-core; }

database: ## Install PostgreSQL (Debian, Ubuntu) where it is missing; nothing of it needs to run
	@command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || { \
		$(AS_ROOT) apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive $(AS_ROOT) apt-get install -y -qq --no-install-recommends \
			postgresql; } || echo "PostgreSQL is not to be had: tests of the ledger in it are skipped."

test-browser: $(STAMP) browser ## Look at the dashboard in a headless browser
	NITSUM_NEED_BROWSER=1 $(PY) -m pytest -m browser

test-clients: $(STAMP) $(CLIENTS)/.installed ## Talk to the server with clients of other projects
	$(CLIENTS)/bin/python -m pytest -c tests/clients/pytest.ini tests/clients "--server-python=$(CURDIR)/$(PY)"

$(CLIENTS)/.installed: tests/clients/requirements.txt tests/clients/constraints.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet -r tests/clients/requirements.txt -c tests/clients/constraints.txt
	@touch $@

prove: $(STAMP) ## Faults, malformed requests and the ledger at full size (half an hour)
	@for run in trouble siege ledger; do echo "== $$run"; $(PY) -m tests.fault.prove $$run || exit 1; done

test-gpu: $(STAMP) ## Run the tests that need a CUDA device
	$(PY) -m pytest -m gpu

# Two at a time, the longest first: servers and workers under test leave a core idle half of the
# time. The output of each appears in one piece when it ends, where make can do that (4.0).
# Both packages are installed before, so that no test is passed over for want of them.
CHECKS := test-processes lint types test-alone test-browser
check: browser database ## Lint, types and tests: what continuous integration runs
	@$(MAKE) --no-print-directory -j2 $(if $(filter output-sync,$(.FEATURES)),-Otarget) $(CHECKS)

lint: $(STAMP) ## Check style
	$(VENV)/bin/ruff check src tests benchmarks
	$(VENV)/bin/ruff format --check src tests benchmarks

types: $(STAMP) ## Check types
	$(VENV)/bin/pyright

format: $(STAMP) ## Format the code and fix what can be fixed
	$(VENV)/bin/ruff format src tests benchmarks
	$(VENV)/bin/ruff check --fix src tests benchmarks

clean: ## Remove the environment and all caches inside this folder
	rm -rf $(VENV) $(CLIENTS) $(COMPILED) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis src/nitsum.egg-info
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
