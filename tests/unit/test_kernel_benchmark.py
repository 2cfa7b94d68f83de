# SPDX-License-Identifier: Apache-2.0
"""benchmarks/kernels.py without a GPU: what it measures where, floors, peers that are missing or fail, and its table."""

import importlib.util
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import contenders
import device_cpu
import device_cuda
import expert_layers
import gpu_ready
import pytest
import torch
from common import Floors, Timing
from contenders import Peers, Rotating
from rich.console import Console
from tiny_models import REPOSITORY

# By its path: `kernels` is also a name that transformers looks for and finds in tests/kernels.
_spec = importlib.util.spec_from_file_location("kernel_benchmark", REPOSITORY / "benchmarks" / "kernels.py")
assert _spec is not None
assert _spec.loader is not None
kernels: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kernels)

FLOORS = Floors(1e12, 1e14, 4e14)


class TimelessDevice:
    """Calls each contender once and says that it took as many microseconds as its name is long."""

    name = "timeless"
    cache_bytes = 1
    activation_bytes = 2

    def __init__(self) -> None:
        self.peers = Peers()
        self.peers.makers["bf16"] = contenders.torch_linear
        self.peers.makers["broken"] = self._broken
        self.peers.makers["picky"] = self._picky
        self.peers.missing["absent"] = "pip install absent"

    def facts(self) -> dict[str, Any]:
        return {"gpu": "none"}

    def floors(self) -> Floors:
        return FLOORS

    def reader(self, memory: Sequence[torch.Tensor]) -> None:
        """As on a GPU."""

    def time(self, calls: Mapping[str, tuple[Callable[[], object], int]], rounds: int, seconds: float) -> dict[str, Timing]:
        for call, _ in calls.values():
            call()
        return {name: Timing(len(name) * 1e-6, len(name) * 1e-6) for name in calls}

    @staticmethod
    def _broken(outputs: int, inputs: int, copies: int) -> Rotating:
        raise RuntimeError("no kernel for this shape\nand much more")

    @staticmethod
    def _picky(outputs: int, inputs: int, copies: int) -> Rotating:
        def one_token(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            assert x.shape[0] == 1, "one token, please"
            return x @ weight.T

        return Rotating(one_token, [torch.zeros(outputs, inputs, dtype=torch.float16)], torch.float16)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MODELS", {"Llama-3-8B": [(64, 96)]})
    monkeypatch.setattr(kernels, "ROTATIONS", [(96, 64)])
    monkeypatch.setattr(expert_layers, "MIXTURES", {"tiny": expert_layers.Mixture(4, 2, 64, 96)})


@pytest.mark.usefixtures("small")
def test_missing_and_failing_peers_are_named_and_the_others_measured() -> None:
    args = kernels.parse(["--device", "cuda", "--tokens", "1", "5"])
    report = kernels.run(args, TimelessDevice())
    linear = [r for r in report["results"] if r["op"] == "linear_w4a8"]
    assert [(r["M"], r["bf16_us"], r["broken_us"], r["picky_us"]) for r in linear] == [(1, 4.0, None, 5.0), (5, 4.0, None, None)]
    producers = {"silu_mul_hadamard_quant", "rms_norm_quant"}
    assert {r["op"] for r in report["results"]} == {"linear_w4a4", "linear_w4a8", "hadamard_quant", "experts_w4a8"} | producers
    assert report["missing_peers"] == {
        "absent": "pip install absent",
        "broken, 64 x 96": "no kernel for this shape",
        "picky, 5 tokens of 96 inputs": "one token, please",
    }
    assert report["left_out"] == []
    text = io.StringIO()
    kernels.show(report, Console(file=text, width=200))
    assert "not measured: absent: pip install absent" in text.getvalue()
    assert "picky / ours" in text.getvalue()


@pytest.mark.usefixtures("small")
def test_no_case_is_begun_when_the_time_is_up() -> None:
    report = kernels.run(kernels.parse(["--device", "cuda", "--tokens", "1", "--minutes", "0"]), TimelessDevice())
    assert report["results"] == []
    assert report["left_out"] == [
        "linear 64 x 96, 1 tokens",
        "hadamard_quant of 96, 1 tokens",
        "silu_mul_hadamard_quant of 96, 1 tokens",
        "rms_norm_quant of 96, 1 tokens",
        "experts of tiny, 1 tokens",
    ]


@pytest.mark.usefixtures("small")
def test_experts_are_timed_beside_those_of_vllm_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    device = TimelessDevice()
    monkeypatch.setattr(device, "name", "cpu")
    args = kernels.parse(["--tokens", "1", "5"])
    rows = list(expert_layers.bench_experts(args, device, FLOORS, kernels.Schedule(None)))
    assert [(row["M"], row["ours_us"], row["bf16_us"]) for row in rows] == [(1, 4.0, 4.0), (5, 4.0, 4.0)]
    # At 1e12 bytes/s: two of four experts of 3 * 64 * 96 half bytes, read once.
    assert rows[0]["floor_us"] == 0.02


def test_each_device_has_its_own_defaults() -> None:
    assert kernels.parse([]).schemes == ["w4a8", "w4a8_g128"]
    cuda = kernels.parse(["--device", "cuda"])
    assert (cuda.models, cuda.tokens[0], cuda.tokens[-1]) == (["Llama-3-8B"], 1, 4096)
    assert kernels.parse(["--device", "cuda", "--tokens", "7"]).tokens == [7]


@pytest.mark.parametrize(
    ("tokens", "scheme", "activation_bytes", "seconds"),
    [
        (1, "w4a8", 0, 1000 * 2000 / 2 / 1e12),
        (1, "w8a8", 2, (1000 * 2000 + 2 * 3000) / 1e12),
        (10**6, "w4a8", 2, 10**6 * 1000 * 2000 / 1e14),
        (10**6, "w4a4", 2, (10**6 * 3000 * 2 + 10**6) / 1e12),  # int4 multiplies in a quarter of the time, so moving counts
    ],
)
def test_the_floor_is_the_longer_of_moving_and_multiplying(
    tokens: int, scheme: str, activation_bytes: int, seconds: float
) -> None:
    assert contenders.floor_seconds(tokens, 1000, 2000, scheme, FLOORS, activation_bytes) == pytest.approx(seconds, rel=1e-6)


def test_peers_that_are_not_installed_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    peers = device_cuda.find_peers()
    assert list(peers.makers) == ["bf16", "fp16"]
    assert list(peers.missing) == ["w8a8", "marlin_w4a16", "humming_w4a4", "humming_w4a8"]
    assert all("pip install" in reason for reason in peers.missing.values())


def test_zentorch_says_that_it_can_be_installed_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zentorch", None)
    peers = device_cpu.CpuDevice("wall").peers
    assert list(peers.makers) == ["bf16", "w8a8"]
    assert list(peers.missing) == ["zentorch_w8a8", "zentorch_w4a8"]
    assert all("pip install zentorch" in reason for reason in peers.missing.values())


@pytest.mark.parametrize(("period", "calls"), [(1, 16), (12, 24), (16, 16), (100, 100)])
def test_a_graph_goes_round_all_weights(period: int, calls: int) -> None:
    assert device_cuda.graph_calls(period) == calls


def test_without_a_gpu_the_reason_and_the_needs_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(SystemExit, match="2"):
        kernels.open_device(kernels.parse(["--device", "cuda"]))
    said = capsys.readouterr().err
    assert "expected a CUDA build" in said
    assert "SMOOTHROT_CUDA=1" in said


def test_a_cuda_torch_without_a_gpu_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch.cuda finds none" in gpu_ready.problems()[0]


def test_a_library_without_kernels_for_the_gpu_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "GPU of sm_75" in gpu_ready.problems()[0]
    monkeypatch.setattr(kernels.ops, "check_cuda", lambda _: None)
    assert gpu_ready.problems() == []
