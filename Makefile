# mlem-diffusion: every target creates .venv if it is missing. `make help` lists the targets.
EXPERIMENT ?= demo
SEEDS ?= 0-63
PYTHON ?= python3
NPROC ?= 1
VENV ?= .venv
BIN := $(VENV)/bin
# a copy of this folder, or a worktree, runs its own code
export PYTHONPATH := $(CURDIR)/src$(if $(PYTHONPATH),:$(PYTHONPATH))
ifeq ($(VENV),)
$(error VENV is empty: activate the environment first, or leave VENV out)
endif
# an environment whose interpreter has gone is set up again
$(shell test -x $(BIN)/python || rm -f $(VENV)/.installed $(VENV)/.installed-test)
DRY := $(if $(filter-out 0 n N no No NO off false False FALSE,$(DRY_RUN)),dry_run=true)
# The environment carries any path unchanged past make, the shell and Hydra, and no record shows it
export MLEM_SOURCE = $(value SOURCE)
unexport SOURCE
# Hydra requires its flag before the first override
SWEEP = $(filter -m --multirun,$(ARGS))
OVERRIDES = experiment=$(EXPERIMENT) $(DRY) $(1) $(filter-out -m --multirun,$(ARGS))
RUN = $(BIN)/python scripts/$(1).py $(SWEEP) $(call OVERRIDES,$(2))
# one process per GPU
COUNT = $(filter gpu cpu auto,$(NPROC))$(shell [ "$(NPROC)" -ge 1 ] 2>/dev/null && echo yes)
RANKS = $(if $(filter-out 1,$(NPROC)),$(if $(COUNT),\
    -m torch.distributed.run --standalone --nproc-per-node $(NPROC),\
    $(error NPROC=$(NPROC) must be a whole number of 1 or more)))
SEVERAL = $(BIN)/python $(RANKS) scripts/$(1).py $(SWEEP) $(call OVERRIDES,$(2))
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help setup demo data train-levels measure-gamma optimise sample-compare report sample publish \
        wandb-sync verify-rates benchmark test lint format clean
.DEFAULT_GOAL := help

help:  ## list the targets and their variables
	@echo "Targets:"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18 | sed 's/^/  /'
	@echo "Variables:"
	@echo "  EXPERIMENT=name   an experiment in configs/experiment (default: demo; make data and benchmark: celeba64):"
	@echo "                    $(basename $(notdir $(wildcard configs/experiment/*.yaml)))"
	@echo "  ARGS=\"k=v ...\"    Hydra overrides for any target; ARGS=\"-m k=a,b\": a sweep, each job in its own folders"
	@echo "  DRY_RUN=1         print the resolved configuration and the estimated cost, then stop"
	@echo "  SOURCE=path       make data: zip, tar or folder of images, or download (torchvision's CelebA)"
	@echo "  SEEDS=0-63        make sample: the sample seeds"
	@echo "  NPROC=n           train-levels, optimise, sample-compare, sample: number of processes, one per GPU"
	@echo "  PYTHON=python3    the interpreter that creates .venv; VENV=dir: another environment"

setup: $(VENV)/.installed  ## create .venv and install the package (other targets do this if necessary)

$(VENV)/.installed: pyproject.toml
	@used=$(BIN)/python; test -x $$used || used=$(PYTHON); \
	$$used -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
	    { echo "make: $$used is missing or too old; install Python 3.10 or later (PYTHON=path), remove $(VENV)."; exit 2; }
	@echo "Setting up $(VENV) (torch and other packages: minutes, several GB)"
	@test -x $(BIN)/python || { find -L $(BIN) -name "python*" -type l -exec rm -f {} + 2>/dev/null; \
	    test ! -e $(VENV) && new=yes; $(PYTHON) -m venv $(VENV) || { test -z "$$new" || rm -rf $(VENV); exit 2; }; }
	@$(PIP) --upgrade pip
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@$(PIP) -e ".[test]"
	@touch $@

demo: setup  ## the full experiment on procedural portraits; about 12 minutes on two CPU cores
	@$(call RUN,prepare_data)
	@$(call SEVERAL,train_levels)
	@$(call SEVERAL,optimise)
	@$(call RUN,measure_gamma)
	@$(call SEVERAL,sample_compare)
	@$(call RUN,report)

data: EXPERIMENT := $(if $(filter file default,$(origin EXPERIMENT)),celeba64,$(EXPERIMENT))
data: setup  ## images -> packed array: make data SOURCE=path/to/img_align_celeba.zip (or a folder, or download)
	@$(call RUN,prepare_data,$(if $(value SOURCE),'data.source=$${oc.env:MLEM_SOURCE}'))

train-levels: setup  ## train every level of the family
	@$(call SEVERAL,train_levels)

measure-gamma: setup  ## error against FLOPs -> gamma.json, gamma.png, gamma_details.png
	@$(call RUN,measure_gamma)

optimise: setup  ## gains, diagnostics and the best plans -> plans.json, for sample-compare
	@$(call SEVERAL,optimise)

sample-compare: setup  ## EM, ML-EM and baselines -> compare.csv, compare.png, speedup.json
	@$(call SEVERAL,sample_compare)

report: setup  ## results/EXPERIMENT/report.html
	@$(call RUN,report)

sample: setup  ## PNGs and a grid with the best sampler of the comparison: make sample SEEDS=0-63
	@$(call SEVERAL,sample,'seeds="$(subst ",,$(subst ',,$(value SEEDS)))"')

publish: setup  ## trained levels -> checkpoints/EXPERIMENT/published: bf16 weights and model card, to commit
	@$(call RUN,publish)

wandb-sync: setup  ## upload the offline W&B runs of the experiment
	@$(BIN)/wandb sync results/$(EXPERIMENT)/wandb

test: $(VENV)/.installed-test  ## the tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

verify-rates: setup  ## exponents of cost against error on a problem with a known answer; minutes on two CPU cores
	@$(BIN)/python scripts/verify_rates.py $(SWEEP) $(DRY) $(filter-out -m --multirun,$(ARGS))

benchmark: EXPERIMENT := $(if $(filter file default,$(origin EXPERIMENT)),celeba64,$(EXPERIMENT))
benchmark: $(VENV)/.installed-test  ## speed of networks and samplers -> results/benchmark; under three minutes on a CPU
	@$(call RUN,benchmark)

lint: $(VENV)/.installed-test  ## ruff (lint, format), pyright and the import rule
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@$(BIN)/lint-imports --no-cache

format: $(VENV)/.installed-test  ## let ruff rewrite the files
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## remove caches, never results, W&B runs, checkpoints or data
	@rm -rf .pytest_cache .ruff_cache results/*/cache
