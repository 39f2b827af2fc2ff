# All targets share one environment, .venv, made on first use and brought up to date when pyproject.toml or
# constraints.txt change. pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...) decide where packages come from.

# The first Python on the path that is new enough; make PYTHON=... chooses another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
WORKERS ?= auto
DEMO ?= experiments/quickstart.py
ARGS ?=

BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check install -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help test demo check docs doctest format clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*##/\1/p' $(MAKEFILE_LIST) | while read -r name what; do printf '  make %-9s %s\n' "$$name" "$$what"; done

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "scoresde needs Python 3.10 or newer; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "set-up 1/3: environment .venv ($$($(PYTHON) --version))"
	@$(PYTHON) -m venv .venv
	@echo "set-up 2/3: torch (large; this takes a while)"
	@$(PIP) torch
	@echo "set-up 3/3: scoresde and its tools"
	@$(PIP) -e '.[dev]'
	@touch $@

# One thread in each worker: two libraries that both take every core are slower than either.
test: $(READY)  ## run the tests; make test ARGS='-k noise' runs some of them
	@echo "test: pytest, $(WORKERS) workers with one thread each"
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 -ra --durations 5 $(ARGS)

demo: $(READY)  ## run the demonstration; make demo DEMO=experiments/... runs another script
	@echo "demo: $(DEMO)"
	@$(BIN)/python $(DEMO) $(ARGS)

check: $(READY)  ## lint, check the formatting and the types
	@echo "check: ruff check, ruff format, mypy --strict"
	@code=0; $(BIN)/ruff check . || code=1; $(BIN)/ruff format --check . || code=1; $(BIN)/mypy || code=1; exit $$code

# Everything is read anew: on a second run over unchanged pages Sphinx is silent about their warnings.
docs: $(READY)  ## build the documentation; warnings are errors
	@echo "docs: docs/_build/html/index.html"
	@rm -rf docs/api/generated
	@$(BIN)/python -m sphinx -q -E -W --keep-going -b html docs docs/_build/html

doctest: $(READY)  ## run the examples in docstrings, README and documentation
	@echo "doctest: scoresde, README.md and docs"
	@$(BIN)/python -m pytest -q --doctest-modules --doctest-glob='*.md' scoresde README.md $(wildcard docs/*.md docs/*/*.md)

format: $(READY)  ## fix what ruff can fix
	@echo "format: ruff check --fix, ruff format"
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## remove what the other targets made, except .venv
	@echo "clean: caches, build/, dist/, docs/_build/, docs/api/generated/"
	@rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist docs/_build docs/api/generated
	@find scoresde tests docs experiments -name __pycache__ -type d -prune -exec rm -rf {} +
