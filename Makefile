# SPDX-License-Identifier: Apache-2.0
VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?=

MINUTES ?= 10

.PHONY: env demo test fuzz check check-cuda sass bench test-gpu bench-gpu clean

env: $(VENV)/.ready  ## build .venv: vLLM for CPU, the project, its tools

$(VENV)/.ready: requirements/make_env.sh requirements/lock.txt pyproject.toml setup.py $(shell find csrc -type f)
	VENV=$(VENV) requirements/make_env.sh

demo: env  ## convert a real model, serve it, talk to it
	$(BIN)/python benchmarks/demo.py $(if $(MODEL),--model $(MODEL))

test: env  ## every test
	$(BIN)/pytest

fuzz: env  ## mutated files of every kind to everything that reads files of others, for MINUTES
	$(BIN)/python tests/fuzz/fuzz.py --minutes $(MINUTES)

check: env  ## style and types, as CI runs them
	PATH="$(CURDIR)/$(BIN):$$PATH" pre-commit run --all-files

check-cuda: env  ## every CUDA kernel for every architecture: its machine code against docs/sass.md; needs nvcc, no GPU
	$(BIN)/python csrc/cuda/check_sass.py --check

sass: env  ## write docs/sass.md anew
	$(BIN)/python csrc/cuda/check_sass.py

bench: env  ## kernels, then served models, against their peers and the machine's limits
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/serve.py --quick

# Not `env`: that builds vLLM for CPUs. Both say what they need where it is missing, and end with status 2.
test-gpu:  ## the kernels, graphs, streams, the converter and a served model on a GPU, with the python of VENV
	$(BIN)/python -m pytest tests/gpu

# Meant to take 8 minutes together, the models that a first run makes included: what the time does not last for is named.
bench-gpu:  ## kernels, then served models, on a GPU against their peers there; results/<GPU>/{kernels,serve}.json
	$(BIN)/python benchmarks/kernels.py --device cuda --minutes 1.5
	$(BIN)/python benchmarks/serve.py --device cuda --models Llama-3.2-1B --quick --rounds 1 --minutes 5

clean:
	rm -rf build demo-output *.egg-info smoothrot_vllm/*.so
