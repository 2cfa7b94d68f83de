# SPDX-License-Identifier: Apache-2.0
VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?=
# Of a machine with a GPU, and of the rehearsal for it: neither has vLLM.
PYTHON ?= python3
BARE_VENV ?= .venv-torch211
BARE_PYTHON ?= $(shell python3.12 -c '' 2>/dev/null && echo python3.12 || echo python3)
OUT ?= gpu-proof
MINUTES ?= 8

.PHONY: env demo wheel test test-all fuzz check check-cuda sass bench clean
.PHONY: gpu-bundle gpu-proof gpu-proof-dry-run

env: $(VENV)/.ready  ## build .venv: vLLM for CPU, the project, its tools

SOURCES := pyproject.toml setup.py $(shell find csrc -type f)

$(VENV)/.ready: requirements/make_env.sh requirements/lock.txt $(SOURCES)
	VENV=$(VENV) requirements/make_env.sh

demo: env  ## convert a real model, serve it, talk to it
	$(BIN)/python -m benchmarks.demo.demo $(if $(MODEL),--model $(MODEL))

wheel: env  ## dist/: one wheel for every Python 3, CPU and GPU; needs nvcc, no GPU, takes minutes
	rm -rf dist
	SMOOTHROT_CUDA=1 $(BIN)/python requirements/make_wheel.py dist

test: env  ## every test but the slow ones, as two processes side by side
	$(BIN)/python tests/side_by_side.py -m "not slow"

test-all: env  ## every test: more servers, the wheel, SmolLM2, longer fuzzing
	$(BIN)/python tests/side_by_side.py

fuzz: env  ## mutated files of every kind to everything that reads files of others, for MINUTES
	$(BIN)/python tests/fuzz/fuzz.py --minutes $(MINUTES)

check: env  ## style and types, as CI runs them
	PATH="$(CURDIR)/$(BIN):$$PATH" pre-commit run --all-files

check-cuda: env  ## machine code of every CUDA kernel against docs/sass.md; needs nvcc, no GPU
	$(BIN)/python csrc/cuda/check_sass.py --check

sass: env  ## write docs/sass.md anew
	$(BIN)/python csrc/cuda/check_sass.py

bench: env  ## kernels, then served models, against their peers and the machine's limits
	$(BIN)/python -m benchmarks.kernels.layers
	$(BIN)/python -m benchmarks.serving.serve --quick

gpu-bundle: env  ## gpu-bundle/: what a bare machine with a GPU lacks; needs nvcc, no GPU
	$(BIN)/python -m benchmarks.gpu.bundle

# Not `env`: that builds vLLM for CPUs, and needs a network.
gpu-proof:  ## prove and measure every CUDA kernel on this GPU with PYTHON, in MINUTES, into OUT
	$(PYTHON) -m benchmarks.gpu.proof --bundle gpu-bundle --out $(OUT) --minutes $(MINUTES)

gpu-proof-dry-run: env $(BARE_VENV)/.ready  ## the same on a CPU: emulated, torch 2.11
	$(BARE_VENV)/bin/python -m benchmarks.gpu.proof --dry-run --minutes 30 \
	  --out build/gpu-proof-dry-run

$(BARE_VENV)/.ready: requirements/bare.txt
	$(BARE_PYTHON) -m venv $(BARE_VENV)
	$(BARE_VENV)/bin/python -m pip install -q --disable-pip-version-check -r requirements/bare.txt
	touch $@

clean:
	rm -rf build dist demo-output gpu-bundle gpu-proof *.egg-info smoothrot_vllm/*.so
