# One command per job; `make help` lists them. Each makes its environment where there is none.
#
#   make test PYTHON=python3.12 VENV=/tmp/venv          another interpreter, another place
#   make test CONSTRAINTS=constraints-oldest.txt VENV=.venv-oldest
#   make test TESTS=tests/memory MARK="not slow" JOBS=1 a part of the suite
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
#                                                       torch's CPU wheel, where PyPI's has CUDA (several GB)

PYTHON      ?= python3
VENV        ?= .venv
CONSTRAINTS ?= constraints.txt
TORCH_INDEX ?=
TESTS       ?= tests
MARK        ?=
JOBS        ?= 2
BENCH       ?= $(sort $(wildcard benchmarks/bench_*.py))

BIN     := $(VENV)/bin
INDEX   := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
INSTALL  = $(BIN)/python -m pip install -qq --disable-pip-version-check $(INDEX) -c $(CONSTRAINTS)
INPUTS  := pyproject.toml constraints-common.txt $(CONSTRAINTS)
# A stamp says what is installed in VENV: .user is the package with its extras, .dev also what the checks need,
# .docs what the documentation needs.
USER    := $(VENV)/.user
DEV     := $(VENV)/.dev
DOCS    := $(VENV)/.docs

.DEFAULT_GOAL := help
.PHONY: help demo test lint format type docs bench bench-gpu wheel clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

demo: $(USER)  ## generate with a paged cache, compare, draw the pool
	$(BIN)/paged-cache demo

test: $(DEV)  ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TESTS) -n $(JOBS) --dist worksteal --durations 15 $(if $(MARK),-m "$(MARK)")

lint: $(DEV)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV)  ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(DEV)  ## mypy, strict
	$(BIN)/mypy

docs: $(DOCS)  ## the documentation as a site, in docs/_build/html
	$(BIN)/python -m sphinx -q -E -n -W --keep-going -d docs/_build/doctrees docs docs/_build/html

bench: $(DEV)  ## every benchmark, or BENCH=benchmarks/bench_x.py
	@set -e; for script in $(BENCH); do echo "== $$script"; $(BIN)/python $$script; done

bench-gpu: $(USER)  ## everything for a GPU in 8 minutes, into out/gpu
	$(BIN)/paged-cache bench gpu

wheel: $(DEV)  ## build sdist and wheel into dist/
	rm -rf build dist
	$(BIN)/python -m build --no-isolation

clean:  ## remove environments, builds and caches
	rm -rf .venv .venv-oldest build dist docs/_build docs/_repo *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Order-only: the interpreter's own date says nothing about what is installed.
$(USER): $(INPUTS) | $(BIN)/python
	@echo "Installing into $(VENV); a few minutes the first time"
	$(INSTALL) -e '.[all]'
	@touch $@

$(DEV): $(INPUTS) | $(BIN)/python
	@echo "Installing into $(VENV); a few minutes the first time"
	$(INSTALL) -e '.[all,test,dev]'
	@touch $(USER) $@

$(DOCS): $(INPUTS) | $(BIN)/python
	@echo "Installing into $(VENV)"
	$(INSTALL) -e '.[all,docs]'
	@touch $(USER) $@
