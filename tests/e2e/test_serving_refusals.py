# SPDX-License-Identifier: Apache-2.0
"""What must not be served ends ``vllm serve`` with a message that says why, and never answers a
request.

One refusal of every rank before anything is read, and one in the midst of the weights; the others
are those of the engine, in ``test_engine_arguments.py``.
"""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from stored import edit_file

from benchmarks.support.server import VllmServer

pytestmark = [pytest.mark.serve, pytest.mark.timeout(1200)]

CONVERSION = (
    "--activation-bits",
    "8",
    "--group-size",
    "32",
    "--lm-head-bits",
    "8",
    "--max-tp",
    "1",
)
DOWN = "model.layers.1.mlp.down_proj"


def nan_scale(directory: Path) -> None:
    name = f"{DOWN}.weight_scale"
    edit_file(directory, name, lambda tensors: tensors[name].view(-1)[5].fill_(torch.nan))


def zero_group_scale(directory: Path) -> None:
    """Of two that share a byte, the one in its high nibble."""
    name = f"{DOWN}.weight_group_scale"
    edit_file(directory, name, lambda tensors: tensors[name][5].bitwise_and_(0x0F))


CASES: dict[str, tuple[Callable[[Path], Any], int, str]] = {
    "wrong TP": (
        lambda directory: None,
        2,
        "tensor parallel size 2: each rank would hold 192/2 down_proj inputs",
    ),
    "NaN scale": (
        nan_scale,
        1,
        "of this rank: expected finite scales > 0, got nan and 0 others",
    ),
    "zero group scale": (
        zero_group_scale,
        1,
        f"{DOWN}.weight_group_scale (parts down_proj), row 5, column 1 of this rank: expected"
        " finite scales > 0, got 0 and 2 others",
    ),
}
"""What is done to a converted model, the tensor-parallel size it is served with, and what the
server must say."""


@dataclass(frozen=True)
class Ended:
    """How a server ended."""

    status: int
    log: str


def serve_until_it_ends(case: str, converted: Path, folder: Path) -> Ended:
    damage, ranks, _ = CASES[case]
    directory, log = folder / "model", folder / "server.log"
    shutil.copytree(converted, directory)
    damage(directory)
    server = VllmServer(
        directory, log, "--enforce-eager", "--max-model-len", "256", tensor_parallel=ranks
    )
    server.start()
    try:
        status = server.wait()
    finally:
        server.stop()
    return Ended(status, log.read_text(errors="replace"))


@pytest.fixture(scope="module")
def ended(
    tiny_converted: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Ended]:
    """Every case's server, two at a time: they spend their time importing, on one core each."""
    converted = tiny_converted("llama", *CONVERSION)
    folders = [tmp_path_factory.mktemp("refused") for _ in CASES]
    with ThreadPoolExecutor(2) as pool:
        return dict(
            zip(
                CASES,
                pool.map(serve_until_it_ends, CASES, [converted] * len(CASES), folders),
                strict=True,
            )
        )


@pytest.mark.parametrize("case", CASES)
def test_refused_with_the_reason(ended: dict[str, Ended], case: str) -> None:
    _, _, message = CASES[case]
    assert ended[case].status != 0
    assert message in ended[case].log, ended[case].log[-4000:]
    assert "Application startup complete" not in ended[case].log
