# SPDX-License-Identifier: Apache-2.0
"""What benchmarks.kernels says of a layer: floors, ratios, the presets' schemes, cold weights."""

from typing import Any

import pytest
import torch

from benchmarks.kernels import contenders, cuda_peers, layers, schemes
from benchmarks.kernels.contenders import Calls, Peers, Rotating
from benchmarks.support.cuda_graphs import graph_calls
from benchmarks.support.timing import Floors, Timing
from smoothrot_offline import presets
from smoothrot_offline.source.resolve import resolve
from smoothrot_vllm.format import LinearScheme

FLOORS = Floors(1e12, 1e14, 4e14)


class TimelessDevice:
    """Says of each contender that it took as many microseconds as its name is long."""

    name = "timeless"
    cache_bytes = 1
    activation_bytes = 2

    def __init__(self) -> None:
        self.peers = Peers({"bf16": contenders.torch_linear, "broken": self.broken})

    def facts(self) -> dict[str, Any]:
        return {}

    def floors(self) -> Floors:
        return FLOORS

    def reader(self, memory: Any) -> None:
        """As on a GPU."""

    def time(self, calls: Calls, rounds: int, seconds: float) -> dict[str, Timing]:
        return {name: Timing(len(name) * 1e-6, 1e-9) for name in calls}

    @staticmethod
    def broken(outputs: int, inputs: int, cache_bytes: int) -> Rotating:
        raise RuntimeError("no kernel for this shape\nand much more")


def test_ratios_are_of_medians_and_what_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:

    def ours(columns: int, inputs: int, scheme: LinearScheme, *others: int) -> Rotating:
        if scheme == schemes.every_scheme()["w4a4"]:
            raise RuntimeError("no such kernel")
        return contenders.ours(columns, inputs, scheme, *others)

    monkeypatch.setattr(layers, "ours", ours)
    args = layers.parse(["--device", "cuda", "--dry-run", "--schemes", "w4a8", "w4a4"])
    args.tokens, args.rotations, args.mixtures = [1], [], []
    report = layers.run(args, TimelessDevice())
    linear = [r for r in report["results"] if r["op"].startswith("linear")]
    assert {r["op"] for r in linear} == {"linear_w4a8"}
    for r in linear:
        assert (r["ours_us"], r["bf16_us"], r["bf16_ratio"], r["broken_us"]) == (8, 4, 0.5, None)
        assert r["floor_us"] == max(r["bytes_floor_us"], r["compute_floor_us"])
        assert r["share_of_floor"] == pytest.approx(r["floor_us"] / 8, abs=1e-3)
    assert report["failed"]["w4a4, 192 x 128"] == "RuntimeError: no such kernel"
    assert report["missing"]["broken, 192 x 128"] == "no kernel for this shape"
    assert layers.of_peer("peer", Timing(3.0, 1.0), Timing(2.0, 1.0))["peer_ratio"] == 1.5


def test_no_case_begins_when_the_time_is_up() -> None:
    args = layers.parse(["--device", "cuda", "--dry-run", "--minutes", "0", "--tokens", "1"])
    report = layers.run(args, TimelessDevice())
    assert report["results"] == []
    assert "linear 192 x 128, 1 tokens" in report["left_out"]


@pytest.mark.parametrize(
    ("tokens", "scheme", "activation_bytes", "seconds"),
    [
        (1, "w4a8", 0, (1000 * 1920 / 2 + 4 * 1000) / 1e12),
        (1, "w4a8_g32", 0, (1000 * 1920 / 2 + 4 * 1000 + 1000 * 30) / 1e12),
        (1, "w8a8", 2, (1000 * 1920 + 4 * 1000 + 2 * 2920) / 1e12),
        (10**6, "w4a8", 2, 10**6 * 1000 * 1920 / 1e14),
        # int4 multiplies faster, so moving counts
        (10**6, "w4a4", 2, (10**6 * 2920 * 2 + 1000 * 1920 / 2 + 4 * 1000) / 1e12),
    ],
)
def test_the_floor_is_the_longer_of_moving_and_multiplying(
    tokens: int, scheme: str, activation_bytes: int, seconds: float
) -> None:
    shape = tokens, 1000, 1920, schemes.every_scheme()[scheme]
    floor = contenders.floor_seconds(*shape, FLOORS, activation_bytes)
    assert floor.longer == pytest.approx(seconds, rel=1e-6)


@pytest.mark.parametrize(
    ("period", "seconds", "calls"),
    [(1, 1e-6, 16), (12, 1e-6, 24), (16, 1e-6, 16), (100, 1e-6, 100), (2, 3e-4, 4), (3, 1, 3)],
)
def test_a_graph_goes_round_all_weights(period: int, seconds: float, calls: int) -> None:
    assert graph_calls(period, seconds) == calls


def test_the_schemes_are_those_that_the_presets_write(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = {-1, *(preset.group_sizes[0] for preset in presets.PRESETS.values())}
    assert {scheme.weights.group_size for scheme in schemes.every_scheme().values()} == groups
    timed = layers.parse(["--device", "cuda"]).schemes
    assert sorted(timed) == sorted(
        ["w8a8", *(f"w4{a}{group}" for a in ("a8", "a4") for group in ("", "_g64", "_g32"))]
    )
    options = presets.PRESETS["balanced"].options | {"keep_8bit": 0.0, "lm_head_bits": 16}
    monkeypatch.setitem(presets.PRESETS, "balanced", presets.Preset((128,), options))
    assert list(schemes.written_by(["balanced"])) == ["w4a8_g128", "w4a4_g128"]


@pytest.mark.parametrize("preset", ["balanced", "best"])
def test_as_many_weights_keep_8_bits_as_the_preset_says(preset: str) -> None:
    spec = resolve(schemes.CONFIGS["Llama-3-8B"])
    schema = schemes.preset_schema(spec, preset, 8)
    kept = (spec.linear_shape(name.split(".", 3)[3]) for name in schema.overrides)
    whole = (spec.linear_shape(name) for name in spec.architecture.linears)
    found = sum(n * k for n, k in kept) / (spec.layers * sum(n * k for n, k in whole))
    share = presets.PRESETS[preset].options["keep_8bit"]
    assert share - 0.01 < found <= share


@pytest.mark.parametrize("shape", [(64, 128), (512, 128), (4096, 256)])
def test_every_contenders_weights_are_cold(shape: tuple[int, int]) -> None:
    """It reads more than the cache holds before it repeats itself, but not much more: copies of
    small layers would take minutes to make."""
    cache_bytes = 300_000
    makers: dict[str, Any] = {"bf16": contenders.torch_linear, "int8_mm": cuda_peers.int8_mm}
    makers |= {"fp8_mm": cuda_peers.fp8_mm}
    for name, scheme in schemes.every_scheme().items():
        makers[name] = lambda n, k, cache, scheme=scheme: contenders.ours(n, k, scheme, cache)
    for name, make in makers.items():
        layer = make(*shape, cache_bytes)
        weights = [w if isinstance(w, tuple) else (w,) for w in layer.listed]
        parts: list[torch.Tensor] = [part for weight in weights for part in weight]
        assert len({part.data_ptr() for part in parts}) == len(parts), name
        assert sum(part.nbytes for part in parts) > cache_bytes, name
        assert layer.copies == 2 or (layer.copies - 1) * layer.nbytes <= cache_bytes, name
