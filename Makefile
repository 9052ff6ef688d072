# Every target first makes the virtual environment when there is none.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SEED ?=
WORLDS ?= 2000

.DEFAULT_GOAL := help
.PHONY: help venv demo test check unit integration sim chaos bench proto lower-bounds clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(STAMP): pyproject.toml constraints.txt tools/set_up.sh $(wildcard collectives/*.[ch])
	PYTHON=$(PYTHON) tools/set_up.sh $(VENV)
	@touch $(STAMP)

venv: $(STAMP) ## Make the virtual environment and install what tests need

demo: $(STAMP) ## Train a small GPT with 4 workers, kill one on the way, show that the job finishes
	$(BIN)/python -m tools.demo

check: $(STAMP) ## Format, lint, types, import rules, unit and property tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p elastic_run
	$(BIN)/mypy --strict benchmarks tools
	$(BIN)/lint-imports
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q tests/unit tests/property
	$(BIN)/python -m tools.core_coverage

sim: $(STAMP) ## Simulate seeded worlds (SEED=n for one, WORLDS=n for many)
	$(BIN)/python -m pytest -q tests/simulation $(if $(SEED),--seed=$(SEED)) --worlds=$(WORLDS)

integration: $(STAMP)
	$(BIN)/python -m pytest -q tests/integration

test: check sim integration ## Everything CI runs

chaos: $(STAMP) ## Kill nodes, leaders and etcd under a running job on this machine
	$(BIN)/python -m elastic_run.chaos

bench: $(STAMP) ## Run all benchmarks; BENCH=name for one, QUICK=1 for a minute each
	@for name in $(or $(BENCH),$$($(BIN)/python -m benchmarks --list | cut -d' ' -f1)); do \
		$(BIN)/python -m benchmarks $$name $(if $(QUICK),--quick) || exit 1; \
	done

proto: $(STAMP) ## Regenerate the protobuf code with the oldest supported compiler
	tools/gen_proto.sh

lower-bounds: ## Install the oldest supported dependencies and run the tests on them
	tools/lower_bounds.sh

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) .venv-* build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
