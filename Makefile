# Works from a fresh clone with Python and make alone: every target that needs .venv creates it.

PYTHON ?= python3
PYTEST_ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help .venv demo test check proto proto-check bench bench-growth soak clean

help:  ## list the targets
	@sed -n 's/^\([.a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|' 2>/dev/null \
		|| sed -n 's/^\([.a-z-]*\):.*## \(.*\)/  make \1: \2/p' $(MAKEFILE_LIST)

.venv: $(STAMP)  ## create .venv and install the project and its tools into it

$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## show the main job: a grid search and a loop shared by several processes
	$(BIN)/python examples/demo.py

test: $(STAMP)  ## run the test suite (PYTEST_ARGS="-k name" passes options on)
	$(BIN)/python -m pytest -n 2 -m "not soak" $(PYTEST_ARGS)

check: $(STAMP)  ## lint, formatting, types, generated code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@$(MAKE) --no-print-directory proto-check

proto: $(STAMP)  ## generate proto/distlock_proto/*_pb2* from the contracts
	$(BIN)/python proto/generate.py

proto-check: $(STAMP)  ## fail if the generated code is stale
	$(BIN)/python proto/generate.py --check

bench: $(STAMP)  ## measure beside every peer, a quarter of an hour; results go to benchmarks/results
	$(BIN)/python benchmarks/run.py

bench-growth: $(STAMP)  ## the same question as in bench with 50 million keys: minutes, 3 GB of disk
	$(BIN)/python benchmarks/growth.py 1000000 50000000

soak: $(STAMP)  ## try for an hour to break every promise (SOAK_S=, SOAK_PARTS=, SOAK_SEED=)
	$(BIN)/python -m tests.soak

clean:  ## remove environments, caches and built files
	rm -rf .venv .venv-proto build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
