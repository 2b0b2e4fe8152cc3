# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell command -v $(name))))
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: quickstart help test test-slow lint format bench clean

quickstart: $(INSTALLED)  ## a tiny model on real text: grown, and from scratch at equal compute; minutes
	$(BIN)/raygrow prepare --config-name quickstart
	$(BIN)/raygrow train --config-name quickstart
	$(BIN)/raygrow generate runs/quickstart --prompt "def "

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 14

test: $(INSTALLED)  ## the tests, but for slow ones and those for a GPU; minutes
	$(BIN)/pytest -m "not slow and not gpu"

test-slow: $(INSTALLED)  ## the slow tests: faults and several workers
	$(BIN)/pytest -m "slow and not gpu"

lint: $(INSTALLED)  ## style, types, and which package imports which
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo

format: $(INSTALLED)  ## formats the code, and mends what ruff can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(INSTALLED)  ## benchmarks of training, for one GPU; see benchmarks/README.md
	$(BIN)/python benchmarks/train_throughput.py
	$(BIN)/python benchmarks/gstack_speedup.py search final

clean:  ## removes what builds and tests leave; keeps .venv, data and runs
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# torch first and by itself, so that whichever build the machine's index offers (CPU, CUDA) stays
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(shell grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@
