# SPDX-License-Identifier: Apache-2.0
"""A conversion over the ranks of torchrun: what one process makes, up to the order of sums, and all
end together."""

import hashlib
import json
import signal
import socket
import subprocess
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
from smoothrot_offline.decide.policies import InputStatistics
from smoothrot_offline.device import choose_device
from smoothrot_offline.output.directory import JOURNAL_NAME
from smoothrot_vllm.errors import ConfigError
from smoothrot_vllm.format import MANIFEST_NAME

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


def run_ranks(count: int, *words: object, patch: str = "") -> list[Done]:
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


FIRST = ("layers.0.self_attn.q_", "layers.0.self_attn.k_", "layers.0.self_attn.v_")
"""What reads no linear that is rounded before."""


@pytest.mark.parametrize("name", RECIPES)
def test_two_ranks_decide_and_round_as_one_process(name: str, tmp_path: Path) -> None:
    family, options = RECIPES[name]
    source = save_tiny_model(tmp_path / "source", family)
    for count in (1, 2):
        done = convert(source, tmp_path / str(count), *options, count=count)
        assert [one.returncode for one in done] == [0] * count, done[0].stderr
    one, two = (json.loads((tmp_path / count / MANIFEST_NAME).read_text()) for count in "12")
    assert one["calibration"] == two["calibration"]
    # Adam divides by the gradient's size, so one near zero brings its last bits into what is
    # learned.
    learned = name == "learned"
    for key in ("rotations", "layers"):
        assert_close(two[key], one[key], 0.05 if learned else 1e-3, key)
    assert changed(tmp_path / "1", tmp_path / "2", FIRST) < (0.05 if learned else 0.01)


def assert_close(found: Any, wanted: Any, tolerance: float, where: str) -> None:
    """The same JSON, its numbers up to a relative tolerance, but for errors of rounding."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key in wanted.keys() - {"weight_error"}:
            assert_close(found[key], wanted[key], tolerance, f"{where}.{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for number, pair in enumerate(zip(found, wanted, strict=True)):
            assert_close(*pair, tolerance, f"{where}.{number}")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=tolerance), where
    else:
        assert found == wanted, where


OTHER_ORDER = """
import torch
from smoothrot_offline.decide import stages
def load(*arguments, own=stages.load_calibration):
    return own(*arguments)[torch.tensor({order})]
stages.load_calibration = load
"""


def test_codes_change_no_more_than_with_another_order_of_sums(tmp_path: Path) -> None:
    """One code that rounds the other way reaches all that reads it, so a share of those of later
    linears changes in any case."""
    family, options = RECIPES["gptaq"]
    source = save_tiny_model(tmp_path / "source", family)
    orders = {"whole": range(8), "back": range(8)[::-1], "rolled": [*range(3, 8), *range(3)]}
    half = {"half": [*range(4)] * 2}
    for name, order in (orders | half).items():
        patch = OTHER_ORDER.format(order=[*order])
        words = ("run", source, tmp_path / name, "--preset", "none", *CALIBRATION, *options)
        done = run_forked(patch + COMMAND, *words)
        assert done.returncode == 0, done.stderr
    assert convert(source, tmp_path / "ranks", *options)[0].returncode == 0
    share = {
        name: changed(tmp_path / "whole", tmp_path / name)
        for name in ("back", "rolled", "half", "ranks")
    }
    assert share["ranks"] <= 1.5 * max(share["back"], share["rolled"])
    assert changed(tmp_path / "whole", tmp_path / "ranks", FIRST) < 0.01
    assert share["half"] > 1.5 * share["ranks"]
    assert changed(tmp_path / "whole", tmp_path / "half", FIRST) > 0.1


FAILS = """
from smoothrot_offline.rounding import gptq
def fail(self, *arguments, own=gptq.HessianAccumulator.add, **keywords):
    fail.calls += 1
    if RANK == {rank} and fail.calls == 6:
        {what}
    return own(self, *arguments, **keywords)
fail.calls = 0
gptq.HessianAccumulator.add = fail
"""
REFUSES = "from smoothrot_vllm.errors import CheckpointError as E; raise E('no good')"
BREAKS = "raise KeyError('lost')"
DIES = "os.kill(os.getpid(), 9)"


@pytest.mark.parametrize(
    ("rank", "what", "message"),
    [
        (0, REFUSES, "error: no good"),
        (1, REFUSES, "error: rank 1: no good"),
        (1, BREAKS, "error: unexpected RuntimeError: rank 1: KeyError: 'lost'. This is a bug"),
    ],
)
def test_error_of_one_rank_ends_all_with_one_message(
    tmp_path: Path, rank: int, what: str, message: str
) -> None:
    source, out = save_tiny_model(tmp_path / "source", "llama"), tmp_path / "out"
    first, second = convert(source, out, *GPTQ, patch=FAILS.format(rank=rank, what=what))
    assert (first.returncode, second.returncode) == (1, 1)
    (said,) = (line for line in first.stderr.splitlines() if "error" in line)
    assert said.startswith(message)
    assert (first.stdout, second.stdout, second.stderr) == ("", "", "")
    assert not out.exists()
    if what == REFUSES:
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("rank", [0, 1])
def test_after_a_rank_is_killed_the_same_command_goes_on(tmp_path: Path, rank: int) -> None:
    source, out = save_tiny_model(tmp_path / "source", "llama"), tmp_path / "out"
    whole = convert(source, tmp_path / "whole", *GPTQ)
    assert [one.returncode for one in whole] == [0, 0]
    assert [one.stderr for one in whole[1:]] == [""]
    killed = convert(source, out, *GPTQ, patch=FAILS.format(rank=rank, what=DIES))
    assert killed[rank].returncode == -signal.SIGKILL
    assert killed[1 - rank].returncode == 1
    if rank:
        assert "error: a rank ended without a word" in killed[0].stderr
    assert not out.exists()
    assert (tmp_path / "out.partial" / JOURNAL_NAME).is_file()
    (alone,) = convert(source, out, *GPTQ, count=1)
    assert "machine: ranks: the conversion that was interrupted had 2, this one has 1" in (
        alone.stderr
    )
    again = convert(source, out, *GPTQ)
    assert "went on after 1 finished layers" in again[0].stderr
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--scales", "none"), "2 ranks: expected a conversion that calibrates"),
        (("--calib-samples", "1"), "2 ranks: expected at most 1, a calibration sequence for each"),
    ],
)
def test_ranks_with_nothing_to_do_are_refused(
    tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    source = save_tiny_model(tmp_path / "source", "llama")
    first, second = convert(source, tmp_path / "out", *options)
    assert f"error: {message}" in first.stderr
    assert (first.returncode, second.returncode, second.stderr) == (1, 1, "")


def test_ranks_that_compute_otherwise_are_refused_by_name(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source", "llama")
    patch = "import torch; torch.set_num_threads(1 + RANK)"
    first, second = convert(source, tmp_path / "out", patch=patch)
    assert "error: rank 1: machine: threads: expected what the first rank has, 1, got 2." in (
        first.stderr
    )
    assert (first.returncode, second.returncode, second.stderr) == (1, 1, "")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_other_commands_are_refused_under_torchrun(tmp_path: Path) -> None:
    for done in run_ranks(2, "inspect", tmp_path):
        assert done.returncode == 1
        assert "error: WORLD_SIZE is 2: expected one process, as only run shares" in done.stderr


def test_torchrun_itself_starts_a_conversion(tmp_path: Path) -> None:
    source, out = save_tiny_model(tmp_path / "source", "llama"), tmp_path / "out"
    command = [BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command += [BIN / "smoothrot-convert", "run", source, out, "--preset", "none", *CALIBRATION]
    done = subprocess.run(
        [*map(str, command), "--json"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(out)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_ranks_together_sample_the_tokens_of_one_process(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    samples, seqlen = 7, 1500
    tokens = torch.arange(samples * seqlen, dtype=torch.float32).view(samples, seqlen, 1)
    monkeypatch.setattr(ranks, "count", lambda: count)
    found = []
    for rank in range(count):
        monkeypatch.setattr(ranks, "number", lambda rank=rank: rank)
        statistics = InputStatistics(1, samples * seqlen, seqlen=seqlen)
        for chunk in ranks.share(tokens).split(2):
            statistics.update(chunk.flatten(0, -2))
        found.append(statistics.sample)
    assert statistics.stride == 5
    assert torch.cat(found).flatten().sort().values.tolist() == list(range(0, tokens.numel(), 5))


def test_each_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_gpu(monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(ranks, "place", lambda: 1)
        for option in ("auto", "cuda"):
            assert choose_device(option).device == torch.device("cuda", 1)
        with pytest.raises(ConfigError, match="--device cuda:0: expected auto, cpu or cuda under"):
            choose_device("cuda:0")
        monkeypatch.setattr(ranks, "place", lambda: 2)
        with pytest.raises(ConfigError, match="expected GPU 2 of those that torch can use, got 2"):
            choose_device("auto")
