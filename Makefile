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
INSTALL := -m pip -qq --disable-pip-version-check install
PIP := $(BIN)/python $(INSTALL) -c constraints.txt
BACKEND := hatchling editables  # what builds scoresde; in the environment itself, so that it is pinned with the rest

# The environment of test-oldest. Old releases of torch have wheels for the Pythons of their time only, and on Linux
# PyPI's are for CUDA, of gigabytes: where pip is offered none, OLDEST_TORCH names a later one and the rest stays old.
OLDEST := .venv-oldest
OLDEST_PYTHON ?= $(PYTHON)
OLDEST_TORCH ?=
OLDEST_READY := $(OLDEST)/.ready-$(OLDEST_TORCH)

# The torch of constraints.txt, which `make constraints` keeps unless it is told another.
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help test test-oldest demo check measures docs browse doctest package format constraints clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*##/\1/p' $(MAKEFILE_LIST) | while read -r name what; do printf '  make %-12s %s\n' "$$name" "$$what"; done

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "scoresde needs Python 3.10 or newer; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "set-up 1/3: environment .venv ($$($(PYTHON) --version))"
	@$(PYTHON) -m venv .venv
	@echo "set-up 2/3: torch (large; this takes a while)"
	@$(PIP) torch $(BACKEND)
	@echo "set-up 3/3: scoresde and its tools"
	@$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

$(OLDEST_READY): pyproject.toml tests/oldest.py
	@echo "set-up 1/3: environment $(OLDEST) ($$($(OLDEST_PYTHON) --version))"
	@$(OLDEST_PYTHON) -m venv --clear $(OLDEST)
	@$(OLDEST)/bin/python $(INSTALL) packaging 'tomli; python_version < "3.11"'
	@$(OLDEST)/bin/python tests/oldest.py test $(addprefix torch=,$(OLDEST_TORCH)) >$(OLDEST)/constraints.txt
	@echo "set-up 2/3:" $$(cat $(OLDEST)/constraints.txt)
	@$(OLDEST)/bin/python $(INSTALL) -c $(OLDEST)/constraints.txt torch
	@echo "set-up 3/3: scoresde and what its tests need"
	@$(OLDEST)/bin/python $(INSTALL) -c $(OLDEST)/constraints.txt -e '.[test]'
	@touch $@

# One thread in each worker: two libraries that both take every core are slower than either.
test: $(READY)  ## run the tests; make test ARGS='-k noise' runs some of them
	@echo "test: pytest, $(WORKERS) workers with one thread each"
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 -ra --durations 5 $(ARGS)

# Old releases use what newer ones of others deprecate; whoever installs both sees that as a warning too.
test-oldest: $(OLDEST_READY)  ## run the tests on the oldest releases that pyproject.toml allows; OLDEST_TORCH=... if pip has not that one
	@echo "test-oldest: pytest, $(WORKERS) workers with one thread each"
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(WORKERS) --maxprocesses 8 -ra \
		-W ignore::DeprecationWarning -W ignore::PendingDeprecationWarning $(ARGS)

demo: $(READY)  ## run the demonstration; make demo DEMO=experiments/... runs another script
	@echo "demo: $(DEMO)"
	@$(BIN)/python $(DEMO) $(ARGS)

check: $(READY)  ## lint, check the formatting, the types and the budgets of pyproject.toml
	@echo "check: ruff check, ruff format, mypy --strict, measures"
	@code=0; $(BIN)/ruff check . || code=1; $(BIN)/ruff format --check . || code=1; $(BIN)/mypy || code=1; \
		$(BIN)/python tests/measures.py --check || code=1; exit $$code

measures: $(READY)  ## print how large the library is and how its parts hang together; make measures ARGS=--all
	@$(BIN)/python tests/measures.py $(ARGS)

# Everything is read anew: on a second run over unchanged pages Sphinx is silent about their warnings.
docs: $(READY)  ## build the documentation; warnings are errors
	@echo "docs: docs/_build/html/index.html"
	@rm -rf docs/api/generated docs/gallery
	@$(BIN)/python -m sphinx -q -E -W --keep-going -b html docs docs/_build/html

browse: $(READY)  ## look at the built documentation in a browser without a network, where there is a Chromium
	@echo "browse: docs/_build/html"
	@$(BIN)/python tests/browse.py docs/_build/html $(ARGS)

doctest: $(READY)  ## run the examples in docstrings, README and documentation
	@echo "doctest: scoresde, README.md and docs"
	@$(BIN)/python -m pytest -q --doctest-modules --doctest-glob='*.md' --ignore=scoresde/plan/kernel.py scoresde README.md $(wildcard docs/*.md docs/*/*.md)

# The environment is outside of the checkout, so that what is imported is what was built.
package: $(READY)  ## build wheel and sdist, install the wheel into an empty environment, and sample with it
	@echo "package: dist/"
	@rm -rf dist
	@$(BIN)/python -m hatchling build >/dev/null
	@place=$$(mktemp -d) && trap 'rm -rf "$$place"' EXIT && $(PYTHON) -m venv $$place/empty \
		&& $$place/empty/bin/python $(INSTALL) -c constraints.txt dist/*.whl \
		&& cp tests/smoke.py $$place && cd $$place && empty/bin/python smoke.py

format: $(READY)  ## fix what ruff can fix
	@echo "format: ruff check --fix, ruff format"
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# Everything anew in an environment that is thrown away: what it holds then is what the next `make` installs.
constraints:  ## find the newest releases of everything but torch, and write constraints.txt; TORCH=... changes that too
	@env=$$(mktemp -d) && trap 'rm -rf "$$env"' EXIT && \
	echo "constraints 1/3: a new environment ($$($(PYTHON) --version))" && \
	$(PYTHON) -m venv "$$env" && \
	echo "constraints 2/3: torch $(TORCH) (large; this takes a while)" && \
	"$$env/bin/python" $(INSTALL) torch==$(TORCH) $(BACKEND) && \
	echo "constraints 3/3: scoresde and its tools" && \
	"$$env/bin/python" $(INSTALL) --no-build-isolation -e '.[dev]' && \
	"$$env/bin/python" tests/pins.py >"$$env/constraints.txt" && \
	cp "$$env/constraints.txt" constraints.txt

clean:  ## remove what the other targets made, except the environments
	@echo "clean: caches, build/, dist/, docs/_build/, docs/api/generated/, docs/gallery/"
	@rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist docs/_build docs/api/generated docs/gallery docs/sg_execution_times.rst
	@find scoresde tests docs experiments -name __pycache__ -type d -prune -exec rm -rf {} +
