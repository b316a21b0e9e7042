# make grow     install irgrow into .venv and grow a network on the embedded digits
# make test     install it with its test tools into .venv and run the quick test suite
# make help     all targets
#
# PYTHON=python3.12      another interpreter for a .venv that does not exist yet
# ARGS="--how gradmax"   passed on to irgrow (grow, bench) or to pytest (test, soak)
# WORKERS=4              test processes
#
# torch comes from your package index. On Linux PyPI has the CUDA build (gigabytes); for the CPU build:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make grow

PYTHON  ?= python3
WORKERS ?= 2
ARGS    ?=

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help grow test lint soak bench results doctor clean
.DELETE_ON_ERROR:

help:
	@echo "make grow    grow a network on the digits data       ARGS=\"--how tiny|gradmax|random ...\""
	@echo "make test    the quick test suite                    ARGS=\"-k lineage\"  WORKERS=$(WORKERS)"
	@echo "make lint    ruff and mypy"
	@echo "make soak    every test, with many random examples (long)"
	@echo "make bench   the benchmarks, beside other libraries  ARGS=..."
	@echo "make results the page bench/results/README.md, from the result files beside it"
	@echo "make doctor  is everything installed and working?"
	@echo "make clean   remove .venv, build products and caches"

grow: $(VENV)/.core
	$(BIN)/irgrow grow digits $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

soak: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --soak $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.bench
	$(BIN)/irgrow bench $(ARGS)

results: $(VENV)/.core
	$(BIN)/python -m bench.page

doctor: $(VENV)/.core
	$(BIN)/irgrow doctor

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# One environment; a stamp says which extra it holds. A stamp older than setup.py or constraints.txt installs again.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "irgrow needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.core: setup.py constraints.txt | $(VENV)/.made
	@echo "installing into $(VENV) (minutes the first time: torch is large)"
	$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: setup.py constraints.txt | $(VENV)/.made
	@echo "installing into $(VENV) (minutes the first time: torch is large)"
	$(PIP) install --quiet -c constraints.txt -e ".[dev]"
	@touch $(VENV)/.core $@

$(VENV)/.bench: setup.py constraints.txt | $(VENV)/.made
	@echo "installing into $(VENV) (minutes the first time: torch is large)"
	$(PIP) install --quiet -c constraints.txt -e ".[bench]"
	@touch $(VENV)/.core $@
