# One command per job; `make help` lists them. Each makes its environment where there is none.
#
#   make test PYTHON=python3.12 VENV=/tmp/venv          another interpreter, another place
#   make test CONSTRAINTS=constraints-oldest.txt VENV=.venv-oldest
#   make test TESTS=tests/memory MARK="not slow" JOBS=1 a part of the suite
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
#                                                       torch's CPU wheel, where PyPI's has CUDA (several GB)
#   make bench FULL=1                                   all that is committed in benchmarks/results, in hours
#   make bench FULL=1 PEER_PYTHON=/tmp/vllm/bin/python  with vLLM, of an environment of its own

PYTHON      ?= python3
VENV        ?= .venv
CONSTRAINTS ?= constraints.txt
TORCH_INDEX ?=
TESTS       ?= tests
MARK        ?=
JOBS        ?= 2
FULL        ?=
PEER_PYTHON ?=

BIN     := $(VENV)/bin
SCRIPTS := $(sort $(wildcard benchmarks/bench_*.py))
INDEX   := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
INSTALL  = $(BIN)/python -m pip install -qq --disable-pip-version-check $(INDEX) -c $(CONSTRAINTS)
PEER    := $(if $(PEER_PYTHON),--peer-python $(PEER_PYTHON))
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

bench: $(USER)  ## every benchmark in 5 minutes, into out/bench; FULL=1: all that is committed
ifeq ($(FULL),)
	$(BIN)/paged-cache bench all --quick --output-dir out/bench $(PEER)
else
	@failed=; run() { echo "== $$*"; "$$@" || failed="$$failed $$2"; }; \
	run $(BIN)/paged-cache bench all --output-dir benchmarks/results --report benchmarks/report.md $(PEER); \
	for script in $(SCRIPTS); do run $(BIN)/python $$script; done; \
	run $(BIN)/python benchmarks/bench_pipeline.py --model shipped; \
	run $(BIN)/python benchmarks/profile_batching.py --output-json benchmarks/results/batching_profile.json; \
	run $(BIN)/python benchmarks/profile_batching.py --model 28m --output-json benchmarks/results/batching_profile_28m.json; \
	run $(BIN)/python benchmarks/soak_batching.py --output-json benchmarks/results/batching_soak.json; \
	run $(BIN)/paged-cache bench report benchmarks/results --output benchmarks/report.md; \
	[ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }
endif

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
