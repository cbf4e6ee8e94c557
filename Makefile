EXPERIMENT ?= quickstart
ARGS ?=
PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
CONFIG = $(if $(wildcard $(EXPERIMENT)),$(EXPERIMENT),experiments/$(EXPERIMENT).yaml)

.DEFAULT_GOAL := help
.PHONY: help install experiment check list benchmark test stress lint types format clean

help: ## show this help
	@echo "usage: make TARGET [EXPERIMENT=name] [ARGS=\"key=value ...\"]"
	@echo
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "experiments: $(basename $(notdir $(wildcard experiments/*.yaml)))"

$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

install: $(VENV)/.installed ## make .venv and install the package into it

experiment: $(VENV)/.installed ## run experiments/EXPERIMENT.yaml (default: quickstart) with the overrides in ARGS
	$(BIN)/python -m flora.simulate $(CONFIG) $(ARGS)

check: $(VENV)/.installed ## validate every experiment without running one
	$(BIN)/python -m flora.simulate --check experiments/*.yaml $(ARGS)

list: $(VENV)/.installed ## print every component with its options
	@$(BIN)/python -m flora.simulate --list

benchmark: $(VENV)/.installed ## time a local step against full fine-tuning, naive LoRA and a loop by hand
	$(BIN)/python -m flora.benchmark $(ARGS)

test: $(VENV)/.installed-dev ## run the test suite
	$(BIN)/python -m pytest $(ARGS)

stress: $(VENV)/.installed-dev ## run the long tests: killed at every moment, hundreds of rounds, odd settings
	$(BIN)/python -m pytest -m stress --timeout 1800 $(ARGS)

lint: $(VENV)/.installed-dev ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev ## check types
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and caches; runs stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info build
