# `make help` lists the targets. `demo` and `test` install by themselves.
PYTHON ?= python3
VENV   ?= .venv
# A CUDA machine takes the registry's CUDA build by the same line; another build: make TORCH="torch==2.11.0"
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test long fast coverage check format services services-stop bench chaos clean

help: ## List the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Install everything into .venv

# torch goes first and by itself, so that no other package chooses its build.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet $(TORCH)
	$(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable ".[dev,s3,gpu]"
	@touch $@

demo: $(STAMP) ## Text to a served, A/B-tested release, on a laptop
	$(BIN)/cherry demo

# Groups of tests (tests/conftest.py) on two processes, the long ones first, which xdist would order by their number.
PYTEST := $(BIN)/python -m pytest -n 2 --no-loadscope-reorder
test: $(STAMP) ## The whole test suite
	$(PYTEST)

long: $(STAMP) ## What `make test` leaves out: README's commands in order, more lost hosts, runs that crash again
	$(BIN)/python -m pytest -m long

# Costs 1.5 times the processor time of what runs in the test process itself; programs that tests start are not counted.
coverage: $(STAMP) ## The whole test suite, with the lines that no test ran
	$(PYTEST) --cov --cov-report=term-missing:skip-covered

fast: $(STAMP) ## The tests that take seconds
	$(BIN)/python -m pytest -m "not slow"

check: $(STAMP) ## Lint, formatting and strict types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## Format and mend what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

services: $(STAMP) ## Prefect and MLflow with PostgreSQL, S3 and passwords, on this machine
	$(BIN)/cherry services up

services-stop: $(STAMP) ## Stop them; their data stays in services/
	$(BIN)/cherry services down

bench: $(STAMP) ## Measure: flow overhead, training step, serving
	$(BIN)/python -m benchmarks.flow_overhead
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.serve_overhead

chaos: $(STAMP) ## Faults at random moments of real jobs, and what they cost; needs root
	$(BIN)/python -m benchmarks.chaos

clean: ## Remove runs and caches (not .venv)
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache .coverage* build *.egg-info
