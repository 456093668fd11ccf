PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# Rebuilt when the requirements change; everything else is editable.
STAMP := $(VENV)/.installed
# setuptools warns of every editable install of a project with several source roots; no setting of
# a project turns it off.
PIP_INSTALL := -W 'ignore:Editable installation' -m pip install -q

# A worker that dies ends the run: with another in its place, xdist may wait without end.
PYTEST := -m pytest -n 2 --dist loadfile --max-worker-restart 0

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all docs-check compat compat-version lint format
.PHONY: bench-cpu bench-cpu-peers cpu-profile kernels-audit clean
.PHONY: gpu gpu-pack gpu-use gpu-dry gpu-check gpu-bench gpu-tune gpu-serve
.PHONY: gpu-check-dry gpu-bench-dry gpu-tune-dry gpu-serve-dry

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[test,bench,dev]'
	@touch $@

install: $(STAMP)  ## Make .venv with SGLang, this package (editable) and all tools

demo: install  ## Compare stock decode with prefix decode in the real engine
	@mkdir -p build
	$(BIN)/sglang-prefix demo --picture build/demo.html --json build/demo.json

# In the order of the files: engines first, so that no long one is left for the end.
test: install  ## Run the tests; they see the sgl_kernel stand-in where there is no GPU
	$(BIN)/sglang-prefix exec -- $(BIN)/python $(PYTEST) \
		--no-loadscope-reorder $(PYTEST_ARGS)

docs-check: install  ## Run every command of the documentation, and check what it says
	$(BIN)/sglang-prefix exec -- $(BIN)/python -m pytest --extended tests/docs $(PYTEST_ARGS)

test-all:  ## As `make test`, with those that repeat on another variant what others show
	$(MAKE) test PYTEST_ARGS="--extended $(PYTEST_ARGS)"

# An environment per release, beside the main one; constraints.txt pins the main one alone.
COMPAT := .venv-compat-$(VERSION)

compat: compat-version $(COMPAT)/.installed  ## Engine tests with another SGLang (VERSION=0.5.17)
	$(COMPAT)/bin/sglang-prefix exec -- $(COMPAT)/bin/python $(PYTEST) \
		tests/engine $(PYTEST_ARGS)

compat-version:
	@$(PYTHON) .ci/compat.py check "$(VERSION)"

.venv-compat-%/.installed: pyproject.toml | compat-version
	$(PYTHON) -m venv .venv-compat-$*
	.venv-compat-$*/bin/python -m pip install -q --upgrade pip
	.venv-compat-$*/bin/python $(PIP_INSTALL) --no-deps 'sglang==$*' -e .
	.venv-compat-$*/bin/python .ci/compat.py requirements > .venv-compat-$*/requirements.txt
	.venv-compat-$*/bin/python -m pip install -q -r .venv-compat-$*/requirements.txt
	@touch $@

lint: install  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## Rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What the compilers make of the main kernels: the environment's Triton, and that of the GPU hosts.
# Both run before a variant that spills ends the target with a status of 1.
GPU_TRITON := 3.6.0
AUDIT := $(BIN)/sglang-prefix kernels --arch sm_90 --kv-length 4096
AUDIT_MAIN := --head-dim 64 --head-dim 128 --head-dim 256 --head-dim 576
AUDIT_CAUSAL := --head-dim 128 --dtype bf16/bf16 --causal
AUDITED := docs/results/compiled/sm_90

build/triton-%/triton/__init__.py: | $(STAMP)
	$(BIN)/python -m pip install -q --no-deps --target build/triton-$* 'triton==$*'

kernels-audit: install build/triton-$(GPU_TRITON)/triton/__init__.py  ## Count the kernels' instructions, with two Tritons, and commit the result
	status=0; own=$$($(BIN)/python -c 'import triton; print(triton.__version__)'); \
	audit() { $(AUDIT) "$$@" || status=1; }; \
	audit $(AUDIT_MAIN) --json $(AUDITED)-triton-$$own.json; \
	audit $(AUDIT_CAUSAL) --json $(AUDITED)-causal-triton-$$own.json; \
	other="--triton build/triton-$(GPU_TRITON)"; \
	audit $(AUDIT_MAIN) $$other --json $(AUDITED)-triton-$(GPU_TRITON).json; \
	audit $(AUDIT_CAUSAL) $$other --json $(AUDITED)-causal-triton-$(GPU_TRITON).json; \
	exit $$status

CPU_PROFILE = docs/results/cpu/$(shell date +%F)-$(shell git describe --always --dirty)-profile.json

cpu-profile: install  ## Measure what work costs this CPU, and plan by it from then on
	$(BIN)/sglang-prefix bench profile --out build/cpu
	cp build/cpu/profile.json $(CPU_PROFILE)
	$(BIN)/sglang-prefix bench profile --write-table $(CPU_PROFILE)

bench-cpu: install  ## Measure our executors against SGLang's own decode, and the host's time
	$(BIN)/sglang-prefix exec -- $(BIN)/sglang-prefix bench kernel --workload cpu --out build/cpu
	$(BIN)/sglang-prefix exec -- $(BIN)/sglang-prefix bench host --out build/cpu

# vLLM wants another torch than SGLang, so it gets an environment of its own, without SGLang. That
# torch, built for CPUs, is on PyTorch's own index.
PEERS := .venv-peers
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

$(PEERS)/.installed: .ci/peers.txt pyproject.toml
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install -q --upgrade pip
	$(PEERS)/bin/python -m pip install -q -r .ci/peers.txt || \
		$(PEERS)/bin/python -m pip install -q --extra-index-url $(TORCH_INDEX) -r .ci/peers.txt
	$(PEERS)/bin/python $(PIP_INSTALL) --no-deps -e .
	@touch $@

# Half an hour on two cores; what is left then is measured by a second call with --resume.
bench-cpu-peers: $(PEERS)/.installed  ## Measure ours against vLLM's attention on this CPU (PEERS_ARGS=--resume)
	$(PEERS)/bin/sglang-prefix bench kernel --workload cpu-peers --workload extends \
		--out build/cpu-peers --budget-s 1800 --no-plots $(PEERS_ARGS)

# On a GPU host: its own python3 with what CONTRIBUTING.md lists; nothing is installed.
GPU_PYTHON ?= python3
GPU_ENTRY := PYTHONPATH="$(CURDIR):$(CURDIR)/kernels:$(CURDIR)/patches$${PYTHONPATH:+:$$PYTHONPATH}"
GPU_OUT ?= build/gpu
GPU_DRY := TRITON_INTERPRET=1 $(GPU_ENTRY)

GPU_RUN := $(GPU_PYTHON) -m sglang_prefix.cli.main bench gpu
GPU_CARRIED ?= build/gpu-carried
GPU_MINUTES ?= build/gpu-minutes

gpu:  ## All that matters on this host's GPU in nine minutes (GPU_ARGS=--resume)
	$(GPU_ENTRY) $(GPU_RUN) --out $(GPU_MINUTES) $(addprefix --carried ,$(wildcard $(GPU_CARRIED))) $(GPU_ARGS)

gpu-pack: install  ## What a GPU host without a network needs (GPU_ARGS="--wheel FILE --kit FOLDER --fasttree FOLDER")
	$(BIN)/sglang-prefix bench gpu --pack $(GPU_CARRIED) --cache build/gpu-cache $(GPU_ARGS)

gpu-use: install  ## Take the results of `make gpu` into this checkout
	$(BIN)/sglang-prefix bench gpu --use $(GPU_MINUTES) $(GPU_ARGS)

gpu-check:  ## Compare all kernel variants with the oracle on this host's GPU (GPU_ARGS="--resume FILE")
	$(GPU_ENTRY) $(GPU_PYTHON) -m pytest -m gpu tests/gpu $(GPU_ARGS)

gpu-bench:  ## Measure on this host's GPU, against what can be imported (GPU_ARGS="--resume")
	$(GPU_ENTRY) $(GPU_PYTHON) -m sglang_prefix.cli.main bench kernel --workload gpu \
		--out $(GPU_OUT) --no-plots --no-report $(GPU_ARGS)

gpu-tune:  ## Compare tiles of the forward kernel on this host's GPU (GPU_ARGS="--write-table FILE")
	$(GPU_ENTRY) $(GPU_PYTHON) -m sglang_prefix.cli.main bench tune --out $(GPU_OUT) $(GPU_ARGS)

gpu-serve:  ## Serve a model on this host's GPU, ours against SGLang's own (GPU_ARGS=--resume)
	$(GPU_ENTRY) $(GPU_PYTHON) -m sglang_prefix.cli.main bench serving --engine \
		--out build/gpu-serve $(GPU_ARGS)

gpu-dry: install  ## The logic of gpu on tiny shapes, without a GPU; measures nothing
	$(BIN)/sglang-prefix exec -- $(BIN)/sglang-prefix bench gpu --dry --out build/gpu-dry $(GPU_ARGS)

gpu-check-dry: install  ## The logic of gpu-check on tiny shapes, without a GPU
	$(GPU_ENTRY) $(BIN)/python -m pytest -m gpu tests/gpu --dry $(GPU_ARGS)

gpu-bench-dry: install  ## The logic of gpu-bench on tiny shapes, without a GPU; measures nothing
	$(GPU_DRY) $(BIN)/python -m sglang_prefix.cli.main bench kernel --dry --out build/dry \
		--no-plots $(GPU_ARGS)

gpu-tune-dry: install  ## The logic of gpu-tune on tiny shapes, without a GPU; measures nothing
	$(GPU_DRY) $(BIN)/python -m sglang_prefix.cli.main bench tune --dry --out build/dry $(GPU_ARGS)

gpu-serve-dry: install  ## The logic of gpu-serve with a tiny model, without a GPU; measures nothing
	$(BIN)/sglang-prefix bench serving --engine --dry --out build/gpu-serve-dry $(GPU_ARGS)

clean:  ## Remove the environment and everything that was built
	rm -rf $(VENV) .venv-compat-* $(PEERS) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
