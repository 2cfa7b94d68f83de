# SPDX-License-Identifier: Apache-2.0
"""benchmarks/kernels.py without a GPU: what it measures where, floors, peers that are missing or
fail, and its table."""

import importlib.util
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import contenders
import device_cpu
import device_cuda
import expert_layers
import gpu_ready
import peers_cuda
import pytest
import schemes
import torch
from common import Floors, Timing
from contenders import Peers, Rotating
from rich.console import Console
from tiny_models import REPOSITORY

from smoothrot_offline import presets
from smoothrot_offline.source.resolve import resolve
from smoothrot_vllm.format import ActivationScheme, LinearScheme, WeightScheme

# By its path: `kernels` is also a name that transformers looks for and finds in tests/kernels.
_spec = importlib.util.spec_from_file_location(
    "kernel_benchmark", REPOSITORY / "benchmarks" / "kernels.py"
)
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

    def time(
        self, calls: Mapping[str, tuple[Callable[[], object], int]], rounds: int, seconds: float
    ) -> dict[str, Timing]:
        for call, _ in calls.values():
            call()
        return {name: Timing(len(name) * 1e-6, len(name) * 1e-6) for name in calls}

    @staticmethod
    def _broken(outputs: int, inputs: int, cache_bytes: int) -> Rotating:
        raise RuntimeError("no kernel for this shape\nand much more")

    @staticmethod
    def _picky(outputs: int, inputs: int, cache_bytes: int) -> Rotating:
        def one_token(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            assert x.shape[0] == 1, "one token, please"
            return x @ weight.T

        make = partial(torch.zeros, outputs, inputs, dtype=torch.float16)
        return Rotating(one_token, make, 2 * outputs * inputs, cache_bytes, torch.Tensor.half)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MODELS", {"Llama-3-8B": [(64, 96)]})
    small = {"rotations": [(64, 96)], "mixtures": ["tiny"]}
    monkeypatch.setattr(
        kernels, "CUDA_DEFAULTS", kernels.CUDA_DEFAULTS | small | {"schemes": ["w4a8", "w4a4"]}
    )
    monkeypatch.setattr(kernels, "CPU_DEFAULTS", kernels.CPU_DEFAULTS | small)
    monkeypatch.setattr(expert_layers, "MIXTURES", {"tiny": expert_layers.Mixture(4, 2, 64, 96)})


@pytest.mark.usefixtures("small")
def test_missing_and_failing_peers_are_named_and_the_others_measured() -> None:
    args = kernels.parse(["--device", "cuda", "--tokens", "1", "5"])
    report = kernels.run(args, TimelessDevice())
    linear = [r for r in report["results"] if r["op"] == "linear_w4a8"]
    assert [(r["M"], r["bf16_us"], r["broken_us"], r["picky_us"]) for r in linear] == [
        (1, 4.0, None, 5.0),
        (5, 4.0, None, None),
    ]
    producers = {"silu_mul_hadamard_quant", "rms_norm_quant"}
    assert {r["op"] for r in report["results"]} == {
        "linear_w4a4",
        "linear_w4a8",
        "quant",
        "hadamard_quant",
        "experts_w4a8",
    } | producers
    assert report["missing_peers"] == {
        "absent": "pip install absent",
        "broken, 64 x 96": "no kernel for this shape",
        "picky, 5 tokens of 96 inputs": "one token, please",
    }
    assert (report["left_out"], report["failed"]) == ([], {})
    text = io.StringIO()
    kernels.show(report, Console(file=text, width=200))
    assert "not measured: absent: pip install absent" in text.getvalue()
    assert "picky / ours" in text.getvalue()


@pytest.mark.usefixtures("small")
def test_no_case_is_begun_when_the_time_is_up() -> None:
    report = kernels.run(
        kernels.parse(["--device", "cuda", "--tokens", "1", "--minutes", "0"]), TimelessDevice()
    )
    assert report["results"] == []
    assert report["left_out"] == [
        "linear 64 x 96, 1 tokens",
        "hadamard_quant of 96 to 4 bits, 1 tokens",
        "hadamard_quant of 96 to 8 bits, 1 tokens",
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
    assert [(row["M"], row["ours_us"], row["bf16_us"]) for row in rows] == [
        (1, 4.0, 4.0),
        (5, 4.0, 4.0),
    ]
    # At 1e12 bytes/s: two of four experts of 3 * 64 * 96 half bytes, read once.
    assert rows[0]["floor_us"] == 0.02


def test_each_device_has_its_own_defaults() -> None:
    assert kernels.parse([]).schemes == ["w4a8", "w4a8_g128"]
    cuda = kernels.parse(["--device", "cuda"])
    assert (cuda.models, cuda.tokens, cuda.minutes) == (
        ["Llama-3-8B"],
        [1, 4, 16, 64, 256, 1024, 4096],
        2.0,
    )
    assert kernels.parse(["--device", "cuda", "--tokens", "7"]).tokens == [7]


@pytest.mark.parametrize(
    ("tokens", "scheme", "activation_bytes", "seconds"),
    [
        (1, "w4a8", 0, (1000 * 1920 / 2 + 4 * 1000) / 1e12),
        (1, "w4a8_g32", 0, (1000 * 1920 / 2 + 4 * 1000 * 60) / 1e12),
        (1, "w8a8", 2, (1000 * 1920 + 4 * 1000 + 2 * 2920) / 1e12),
        (10**6, "w4a8", 2, 10**6 * 1000 * 1920 / 1e14),
        (
            10**6,
            "w4a4",
            2,
            (10**6 * 2920 * 2 + 1000 * 1920 / 2 + 4 * 1000) / 1e12,
        ),  # int4 multiplies faster, so moving counts
    ],
)
def test_the_floor_is_the_longer_of_moving_and_multiplying(
    tokens: int, scheme: str, activation_bytes: int, seconds: float
) -> None:
    floor = contenders.floor_seconds(
        tokens, 1000, 1920, schemes.every_scheme()[scheme], FLOORS, activation_bytes
    )
    assert floor.longer == pytest.approx(seconds, rel=1e-6)


def test_peers_that_are_not_installed_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    peers = peers_cuda.find_peers()
    assert list(peers.makers) == ["bf16", "int8_mm", "fp8_tensor_mm", "fp8_row_mm"]
    of_vllm = [f"vllm_{name}" for name in ("w8a8", "marlin_w4a16", "machete_w4a16", "cutlass_w4a8")]
    assert list(peers.missing) == ["torch_w4a16", *of_vllm, "humming_w4a4", "humming_w4a8"]
    assert "CUDA" in peers.missing.pop("torch_w4a16")
    assert all("pip install" in reason for reason in peers.missing.values())


def test_zentorch_says_that_it_can_be_installed_where_it_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "zentorch", None)
    peers = device_cpu.CpuDevice("wall").peers
    assert list(peers.makers) == ["bf16", "w8a8"]
    assert list(peers.missing) == ["zentorch_w8a8", "zentorch_w4a8"]
    assert all("pip install zentorch" in reason for reason in peers.missing.values())


@pytest.mark.parametrize(
    ("period", "seconds", "calls"),
    [(1, 1e-6, 16), (12, 1e-6, 24), (16, 1e-6, 16), (100, 1e-6, 100), (2, 3e-4, 4), (3, 1, 3)],
)
def test_a_graph_goes_round_all_weights(period: int, seconds: float, calls: int) -> None:
    assert device_cuda.graph_calls(period, seconds) == calls


def test_the_schemes_are_those_that_the_presets_write(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = {-1, *(preset.group_sizes[0] for preset in presets.PRESETS.values())}
    assert {scheme.weights.group_size for scheme in schemes.every_scheme().values()} == groups
    per_channel, balanced, best = (
        ["w4a8", "w4a4", "w8a8"],
        ["w4a8_g64", "w4a4_g64", "w8a8_g64"],
        ["w4a8_g32", "w4a4_g32", "w8a8_g32"],
    )
    assert sorted(kernels.parse(["--device", "cuda"]).schemes) == sorted(
        per_channel + balanced + best
    )
    eight_bits = LinearScheme(
        weights=WeightScheme(bits=8, group_size=64), activations=ActivationScheme(bits=8, clip=1.0)
    )
    assert schemes.every_scheme()["w8a8_g64"] == eight_bits
    changed = presets.Preset(
        (128,), presets.PRESETS["balanced"].options | {"keep_8bit": 0.0, "lm_head_bits": 16}
    )
    monkeypatch.setitem(presets.PRESETS, "balanced", changed)
    assert list(schemes.written_by(["balanced"])) == ["w4a8_g128", "w4a4_g128"]


@pytest.mark.parametrize("preset", ["balanced", "best"])
def test_as_many_weights_are_kept_at_8_bits_as_the_preset_says(preset: str) -> None:
    spec = resolve(schemes.CONFIGS["Llama-3-8B"])
    schema = schemes.preset_schema(spec, preset, 8)
    sizes = [spec.linear_shape(name.split(".", 3)[3]) for name in schema.overrides]
    whole = spec.layers * sum(
        outputs * inputs for outputs, inputs in map(spec.linear_shape, spec.architecture.linears)
    )
    share = presets.PRESETS[preset].options["keep_8bit"]
    assert share - 0.01 < sum(outputs * inputs for outputs, inputs in sizes) / whole <= share


@pytest.mark.parametrize("shape", [(64, 128), (512, 128), (4096, 256)])
def test_every_contender_reads_more_than_the_cache_holds_before_it_repeats_itself(
    shape: tuple[int, int],
) -> None:
    cache_bytes = 300_000
    makers: dict[str, Any] = {"bf16": contenders.torch_linear, "int8_mm": peers_cuda.int8_mm}
    makers |= {f"fp8_{by_row}": partial(peers_cuda.fp8_mm, by_row) for by_row in (False, True)}
    layers = {name: make(*shape, cache_bytes) for name, make in makers.items()}
    layers |= {
        name: contenders.ours(*shape, scheme, cache_bytes)
        for name, scheme in schemes.every_scheme().items()
    }
    for name, layer in layers.items():
        weights = [weight if isinstance(weight, tuple) else (weight,) for weight in layer.listed]
        assert len({part.data_ptr() for weight in weights for part in weight}) == sum(
            map(len, weights)
        ), name
        assert sum(part.nbytes for weight in weights for part in weight) > cache_bytes, name
        # And no more than needed: copies of small layers would take minutes to make.
        assert layer.copies == 2 or (layer.copies - 1) * layer.nbytes <= cache_bytes, name


def test_the_dry_run_covers_every_case_of_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, tokens = tmp_path / "kernels.json", ["1", "64"]
    arguments = [
        "kernels.py",
        "--device",
        "cuda",
        "--minutes",
        "2.0",
        "--json",
        str(output),
        "--dry-run",
        "--tokens",
        *tokens,
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    threads = torch.get_num_threads()
    try:
        assert kernels.main() == 0
    finally:
        torch.set_num_threads(threads)
    report = json.loads(output.read_text())
    assert (report["left_out"], report["failed"]) == ([], {})
    assert "CUDA" in report["missing_peers"]["torch_w4a16"]
    linear = [r for r in report["results"] if r["op"].startswith("linear_")]
    cases = {(r["op"], tuple(r["shape"]), r["M"]) for r in linear}
    assert cases == {
        (f"linear_{s}", shape, m)
        for s in schemes.written_by(kernels.GPU_PRESETS)
        for shape in kernels.MODELS["rehearsal"]
        for m in (1, 64)
    }
    for r in linear:
        assert r["floor_us"] == max(r["bytes_floor_us"], r["compute_floor_us"])
        assert r["share_of_floor"] == pytest.approx(
            r["floor_us"] / r["ours_us"], rel=0.02, abs=1e-3
        )
        for peer in ("bf16", "int8_mm", "fp8_tensor_mm", "fp8_row_mm"):
            assert r[f"{peer}_ratio"] == pytest.approx(
                r[f"{peer}_us"] / r["ours_us"], rel=0.02, abs=1e-3
            )
    prepared = {(r["op"], r["act_bits"], r["M"]) for r in report["results"] if "act_bits" in r}
    assert prepared == {
        (op, bits, m) for op in ("quant", "hadamard_quant") for bits in (4, 8) for m in (1, 64)
    }


@pytest.mark.usefixtures("small")
def test_a_scheme_that_fails_is_named_and_the_others_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    working = kernels.ours

    def ours(columns: int, inputs: int, scheme: LinearScheme, *others: int) -> Rotating:
        if scheme == schemes.every_scheme()["w4a4"]:
            raise RuntimeError("no such kernel")
        return working(columns, inputs, scheme, *others)

    monkeypatch.setattr(kernels, "ours", ours)
    report = kernels.run(kernels.parse(["--device", "cuda", "--tokens", "1"]), TimelessDevice())
    assert report["failed"]["w4a4, 64 x 96"] == "RuntimeError: no such kernel"
    assert [r["op"] for r in report["results"] if r["op"].startswith("linear")] == ["linear_w4a8"]


@pytest.mark.usefixtures("small")
def test_a_section_that_fails_is_named_and_the_others_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any) -> Iterator[dict[str, Any]]:
        yield {"op": "the one before"}
        raise ArithmeticError("no such number")

    monkeypatch.setattr(kernels, "bench_producers", broken)
    report = kernels.run(kernels.parse(["--device", "cuda", "--tokens", "1"]), TimelessDevice())
    assert report["failed"] == {"producers": "ArithmeticError: no such number"}
    assert {"linear_w4a8", "the one before", "experts_w4a8"} <= {r["op"] for r in report["results"]}


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


def test_a_library_without_kernels_for_the_gpu_is_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "GPU of sm_75" in gpu_ready.problems()[0]
    monkeypatch.setattr(kernels.ops, "check_cuda", lambda _: None)
    assert gpu_ready.problems() == []
