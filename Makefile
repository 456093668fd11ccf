PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# Rebuilt when the requirements change; everything else is editable.
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format bench-cpu clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test,bench,dev]'
	@touch $@

install: $(STAMP)  ## Make .venv with SGLang, this package (editable) and all tools

demo: install  ## Compare stock decode with prefix decode in the real engine
	$(BIN)/sglang-prefix demo

test: install  ## Run all tests; they see the sgl_kernel stand-in where there is no GPU
	$(BIN)/sglang-prefix exec -- $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: install  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## Rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-cpu: install  ## Measure the CPU executor against SGLang's own decode
	$(BIN)/sglang-prefix exec -- $(BIN)/python -m benchmarks.cpu

clean:  ## Remove the environment and everything that was built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
