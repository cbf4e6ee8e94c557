EXPERIMENT ?= quickstart
ARGS ?=
PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
CONFIG = $(if $(wildcard $(EXPERIMENT)),$(EXPERIMENT),experiments/$(EXPERIMENT).yaml)

SHELL := bash
.DEFAULT_GOAL := help
.PHONY: docs help install experiment paper averaging communication privacy flip flip-rates neighbours check list benchmark test test-cpus stress lint types format clean

help: ## show this help
	@echo "usage: make TARGET [EXPERIMENT=name] [ARGS=\"key=value ...\"]"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "experiments: $(basename $(notdir $(wildcard experiments/*.yaml)))"

$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-report: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[report,mat]'
	@touch $@

$(VENV)/.installed-privacy: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[report,privacy]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

install: $(VENV)/.installed ## make .venv and install the package into it

experiment: $(VENV)/.installed-report ## run experiments/EXPERIMENT.yaml (default: quickstart) with the overrides in ARGS
	$(BIN)/python -m flora.simulate $(CONFIG) --report $(ARGS)

# Lists are separated by commas; `all` stands for all of them.
DATASETS ?= eurosat
METHODS ?= all
PARTITIONS ?= iid,dirichlet
SEEDS ?= 0,1,2
OUTPUT ?= runs/paper
ALL_DATASETS := fashion_mnist,cifar10,cifar100,tiny_imagenet,caltech101,stanford_cars,sun397,oxford_pets,$\
flowers102,fgvc_aircraft,food101,dtd,eurosat,fer2013,country211,rendered_sst2
ALL_PARTITIONS := iid,dirichlet,pathological,few_shot_overlapping,few_shot_chunks
comma := ,
or_all = $(if $(filter all,$(1)),$(2),$(1))
paper_files = $(patsubst %,experiments/paper/%.yaml,$(subst $(comma), ,$(call or_all,$(METHODS),*)))

paper: $(VENV)/.installed-report ## run and tabulate experiments/paper: DATASETS= METHODS= PARTITIONS= SEEDS= OUTPUT=
	$(BIN)/python -m flora.sweep $(paper_files) data.name=$(call or_all,$(DATASETS),$(ALL_DATASETS)) \
	  partition=$(call or_all,$(PARTITIONS),$(ALL_PARTITIONS)) seed=$(SEEDS) --output $(OUTPUT) $(ARGS)

# What others are compared with, where it is among them.
reference = $(if $(filter %/fedavg.yaml %/*.yaml,$(1)),--reference fedavg)

STRATEGIES ?= all
averaging_files = $(patsubst %,experiments/averaging/%.yaml,$(subst $(comma), ,$(call or_all,$(STRATEGIES),*)))

averaging: $(VENV)/.installed-report ## run and tabulate experiments/averaging: STRATEGIES= SEEDS= ARGS=
	$(BIN)/python -m flora.sweep $(averaging_files) seed=$(SEEDS) $(call reference,$(averaging_files)) --output runs/averaging $(ARGS)

COMMUNICATION ?= all
communication_files = $(patsubst %,experiments/communication/%.yaml,$(subst $(comma), ,$(call or_all,$(COMMUNICATION),*)))

communication: $(VENV)/.installed-report ## run and tabulate experiments/communication: COMMUNICATION= DATASETS= SEEDS=
	$(BIN)/python -m flora.sweep $(communication_files) data.name=$(call or_all,$(DATASETS),$(ALL_DATASETS)) \
	  seed=$(SEEDS) $(call reference,$(communication_files)) --output runs/communication $(ARGS)

LEARNERS ?= all
CLIENTS ?= 100,1000
EPSILONS ?= 1,3,10
privacy_files = $(patsubst %,experiments/privacy/%.yaml,$(subst $(comma), ,$(call or_all,$(LEARNERS),*)))

privacy: $(VENV)/.installed-privacy ## run and tabulate experiments/privacy: LEARNERS= CLIENTS= EPSILONS= SEEDS= ARGS=
	$(BIN)/python -m flora.sweep $(privacy_files) clients.number=$(CLIENTS) privacy.target_epsilon=$(EPSILONS) \
	  seed=$(SEEDS) --output runs/privacy $(ARGS)
	$(BIN)/python -m flora.sweep $(privacy_files) clients.number=$(CLIENTS) seed=$(SEEDS) --set privacy=null \
	  --output runs/privacy_none $(ARGS)

# DATASETS and METHODS as above. SCENARIOS: also personal; cross_domain and multi_domain for data with domains (DOMAINS);
# cross_data_set (ALSO). PRESET=flip_small is for two cores; DOWNLOAD= for data that are not downloaded.
SCENARIOS ?= global,dual,few_shot,base_to_new,base_to_new_clients,unseen_clients
PRESET ?= flip
SHOTS ?= 1,2,4,8,16
DOMAINS ?=
ALSO ?=
RATES ?= 0.0003,0.001,0.003,0.01,0.03,0.1,0.3
DATA_ROOT ?= data
DOWNLOAD ?= true
CHOSEN ?= experiments/flip/$(PRESET).json
FLIP := runs/flip
flip_files = $(patsubst %,experiments/flip/%.yaml,$(subst $(comma), ,$(call or_all,$(METHODS),*)))
flip_data = {name: $(1), root: $(DATA_ROOT)$(if $(DOWNLOAD),$(comma) download: $(DOWNLOAD))}
flip_also = --set 'evaluation.also=[$(foreach name,$(subst $(comma), ,$(ALSO)),$(call flip_data,$(name))$(comma))]'
flip_set = --set preset=$(PRESET) --set data.root=$(DATA_ROOT) $(if $(DOWNLOAD),--set data.download=$(DOWNLOAD))
flip_axis_few_shot = partition.shots=$(SHOTS)
flip_axis_cross_domain = split.domain=$(DOMAINS)

define flip_sweep
	$(BIN)/python -m flora.sweep $(flip_files) data=$(DATASETS) $(flip_axis_$(1)) seed=$(SEEDS) $(flip_set) \
	  --set scenario=$(1) $(if $(filter cross_data_set,$(1)),$(flip_also)) --skip-refused \
	  $(if $(wildcard $(CHOSEN)),--chosen $(CHOSEN)) --output $(FLIP)/$(1) $(ARGS)

endef

flip: $(VENV)/.installed-report ## run and tabulate experiments/flip: DATASETS= METHODS= SCENARIOS= SEEDS= PRESET= ARGS=
	$(foreach scenario,$(subst $(comma), ,$(SCENARIOS)),$(call flip_sweep,$(scenario)))

flip-rates: $(VENV)/.installed-report ## choose the learning rates of experiments/flip on validation images: RATES= PRESET=
	$(BIN)/python -m flora.sweep $(flip_files) data=$(DATASETS) local.learning_rate=$(RATES) seed=0 $(flip_set) \
	  --set scenario=dual --set split.of=validation --choose local.learning_rate --chosen $(CHOSEN) \
	  --output $(FLIP)/rates_$(PRESET) $(ARGS)

NEIGHBOUR ?= self_training

neighbours: $(VENV)/.installed-report ## run and tabulate experiments/neighbours/NEIGHBOUR (docs/neighbours.md): SEEDS=
	$(BIN)/python -m flora.sweep experiments/neighbours/$(NEIGHBOUR)/*.yaml seed=$(SEEDS) \
	  --output runs/neighbours/$(NEIGHBOUR) $(ARGS)

check: $(VENV)/.installed ## validate every experiment without running one
	$(BIN)/python -m flora.simulate --check $$(find experiments -name '*.yaml' | sort) $(ARGS)

list: $(VENV)/.installed ## print every component with its options
	@$(BIN)/python -m flora.simulate --list

benchmark: $(VENV)/.installed ## time a local step against full fine-tuning, naive LoRA and a loop by hand
	$(BIN)/python -m flora.benchmark $(ARGS)

docs: $(VENV)/.installed ## write the generated parts of the pages in docs/
	$(BIN)/python docs/generate.py

test: $(VENV)/.installed-dev ## run the test suite
	$(BIN)/python -m pytest $(ARGS)

# Older CPUs' instructions, for PyTorch's own code, MKL and oneDNN; each test file that holds results to 1e-9.
CPUS := avx2,AVX2,AVX2 default,SSE4_2,SSE41
NUMERICAL = $(shell grep -l TOLERANCE tests/test_*.py)

test-cpus: $(VENV)/.installed-dev ## run the numerical tests as on older CPUs, AVX2 and SSE4
	@set -e; for cpu in $(CPUS); do IFS=, read -r aten mkl onednn <<< "$$cpu"; echo "ATEN $$aten, MKL $$mkl, oneDNN $$onednn"; \
	  ATEN_CPU_CAPABILITY=$$aten MKL_ENABLE_INSTRUCTIONS=$$mkl ONEDNN_MAX_CPU_ISA=$$onednn \
	  $(BIN)/python -m pytest $(NUMERICAL) $(ARGS); done

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
