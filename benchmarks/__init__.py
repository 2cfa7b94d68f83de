# SPDX-License-Identifier: Apache-2.0
"""Measurements. Each runs from the repository's root as ``python -m benchmarks.FOLDER.NAME``.

- ``kernels``: our layers and whole decode steps beside those of others, on a CPU or a GPU.
- ``serving``: models behind ``vllm serve``: speed, where a decode step goes, hours of mixed load.
- ``conversion``: perplexity of every recipe, and what large models take.
- ``demo``: what ``make demo`` shows.
- ``gpu``: ``make gpu-proof`` and what it carries to a machine with a GPU.
- ``support``: what they share, some of it with the tests.
- ``results``: the JSON behind every table of docs/benchmarks.md.
"""
