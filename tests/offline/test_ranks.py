# SPDX-License-Identifier: Apache-2.0
"""A conversion over the ranks of torchrun: what one process makes, up to the order of sums, and all
end together."""

import hashlib
import json
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import COMMAND, run_forked
from safetensors.torch import load_file
from simulated_gpu import simulated_gpu
from tiny_models import BIN, SHORT_TEXT, save_tiny_model

from smoothrot_offline import ranks
from smoothrot_offline.device import choose_device
from smoothrot_offline.output.directory import JOURNAL_NAME
from smoothrot_vllm.errors import ConfigError

Done = subprocess.CompletedProcess[str]
CALIBRATION = ("--calib", str(SHORT_TEXT), "--calib-samples", "8", "--calib-seqlen", "64")
MOST = ("--clip-search", "--keep-8bit", "auto:0.2", "--smooth-norms", "--sign-seeds", "2")
GPTQ = ("--rounding", "gptq", "--activation-bits", "8")
RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "to nearest": ("llama", MOST),
    "gptq": ("llama", (*GPTQ, *MOST)),
    "by the model": ("llama", (*GPTQ, "--hessian", "model", "--scales", "search")),
    "gptaq": ("qwen2", ("--rounding", "gptaq", "--activation-bits", "8")),
    "experts": ("mixtral", (*GPTQ, "--keep-8bit", "auto:0.2", "--scales", "quantile")),
    "learned": ("llama", ("--rotations", "learned", "--rotation-steps", "3")),
}


def run_ranks(count: int, *words: object, patch: str = "", samples: int = 8) -> list[Done]:
    """``smoothrot-convert`` in several processes, as torchrun starts them; ``patch`` is run first,
    and may look at ``RANK``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(rank: int) -> Done:
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
        variables = {name: str(value) for name, value in told.items()}
        variables["MASTER_ADDR"] = "127.0.0.1"
        begin = f"import os\nos.environ |= {variables}\nRANK = {rank}\n{patch}\n"
        return run_forked(begin + COMMAND, *words)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def convert(source: Path, out: Path, *options: str, count: int = 2, patch: str = "") -> list[Done]:
    words = ("run", source, out, "--preset", "none", *CALIBRATION, *options)
    return run_ranks(count, *words, patch=patch) if count > 1 else [run_forked(COMMAND, *words)]


def content(directory: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()
    }


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def changed(one: Path, other: Path, layers: tuple[str, ...] = ("",)) -> float:
    """Share of the 4-bit codes that differ, of linears whose names have one of the words."""
    before, after = tensors(one), tensors(other)
    names = [
        name
        for name in before
        if name.endswith("weight_packed") and any(word in name for word in layers)
    ]
    pairs = [(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in names]
    halves = [((a >> shift & 15), (b >> shift & 15)) for a, b in pairs for shift in (0, 4)]
    return sum(int((a != b).sum()) for a, b in halves) / sum(a.numel() for a, _ in halves)


@pytest.mark.parametrize("name", RECIPES)
def test_two_ranks_decide_and_round_as_one_process(name: str, tmp_path: Path) -> None:
    family, options = RECIPES[name]
    source = save_tiny_model(tmp_path / "source", family)
    for count in (1, 2):
        done = convert(source, tmp_path / str(count), *options, count=count)
        assert [one.returncode for one in done] == [0] * count, done[0].stderr
    print(name, changed(tmp_path / "1", tmp_path / "2", ("layers.0.self_attn.q", "layers.0.self_attn.k", "layers.0.self_attn.v")), changed(tmp_path / "1", tmp_path / "2"))
    first, second = (json.loads((tmp_path / c / "smoothrot_manifest.json").read_text()) if (tmp_path / c / "smoothrot_manifest.json").exists() else None for c in "12")
    print([p.name for p in (tmp_path/"1").iterdir()])
