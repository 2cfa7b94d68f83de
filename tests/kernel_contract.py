# SPDX-License-Identifier: Apache-2.0
"""Each CUDA kernel and tile, forced by name, against smoothrot_vllm/reference.py: on a GPU and
on the make-believe one."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from ops_contract import CLIP, EPSILON, Target, assert_same, assert_same_codes

from smoothrot_vllm import reference
from smoothrot_vllm.grouped_experts import grouped_experts

HALVES = [torch.bfloat16, torch.float16]
FLOATS = [torch.float32, *HALVES]
SCHEMES = [(4, 4), (4, 8), (8, 4), (8, 8)]
"""Bits of weights, of activations."""


@dataclass(frozen=True)
class Gemm:
    """What a kernel multiplies."""

    name: str
    capabilities: range = range(80, 1000)
    schemes: tuple[tuple[int, int], ...] = tuple(SCHEMES)
    dtypes: tuple[torch.dtype, ...] = tuple(FLOATS)
    most_tokens: int = 4096
    groups: bool = False
    outputs_multiple: int = 1


SM80, SM90 = range(80, 90), range(90, 91)
GEMMS = [
    *(
        Gemm(name, most_tokens=16, groups=True)
        for name in ("small", "small_narrow", "small_medium", "small_wide")
    ),
    *(Gemm(name, groups=True) for name in ("s8", "s8_narrow", "s8_wide")),
    *(
        Gemm(f"cutlass_sm80_{tile}", SM80, ((4, 4),), tuple(HALVES), outputs_multiple=8)
        for tile in ("128x256", "128x128", "64x128", "32x64")
    ),
    *(
        Gemm(
            f"cutlass_sm90_s8_{tile}",
            SM90,
            ((8, 4), (8, 8)),
            tuple(HALVES),
            groups=True,
            outputs_multiple=8,
        )
        for tile in ("128x256", "128x128", "128x64")
    ),
    *(
        Gemm(f"cutlass_sm90_{tile}", SM90, ((4, 4), (4, 8)), tuple(HALVES), outputs_multiple=8)
        for tile in ("128x128", "128x64", "128x32")
    ),
]
EXPERTS = ["experts_narrow", "experts_wide"]


def rows() -> Iterator[tuple[str, str, int, int]]:
    """Name, producer, inputs and block of a row for each kernel that quantizes."""
    for producer in ("plain", "silu_mul"):
        for units in (1, 2, 4, 8):
            name, width = f"{producer}_{units}", 4096 * units
            yield f"quant_{name}", producer, width, 0
            yield f"rotate_{name}", producer, width, width
            # Bases 12 and 172: their runs are padded to 16 and to 176 outputs.
            yield f"rotate_{name}_floats", producer, 3072 * units, 12 * 8
            yield f"rotate_{name}_words", producer, 172 * 16 * units, 172 * 16
    for sweeps in (1, 2, 4, 8, 16):
        yield f"rms_norm_{sweeps}", "rms_norm", 2048 * sweeps, 0


ROWS = list(rows())
NAMES = {gemm.name for gemm in GEMMS} | set(EXPERTS) | {name for name, *_ in ROWS}


class KernelContract:
    """Tests that a subclass runs on the target that its fixture ``target`` names, on shapes that
    suit that target."""

    tokens = (1, 16, 17, 70)
    shapes = ((40, 96), (136, 416))
    """Outputs, inputs: multiples of 8 and 32, which all kernels take, and of no tile."""
    groups = ((136, 288, 32), (40, 192, 64), (136, 384, 128))
    """Outputs, inputs, inputs of a group."""
    row_count = 3
    row_dtypes = tuple(FLOATS)

    @pytest.fixture(autouse=True)
    def _seed(self) -> None:
        torch.manual_seed(0)

    @contextmanager
    def forced(self, target: Target, name: str) -> Iterator[None]:
        """Every product is the named kernel's within."""
        target.ops.force_cuda_gemm(name)
        try:
            yield
        finally:
            target.ops.force_cuda_gemm("")

    def test_every_kernel_of_the_library_is_forced_here(self, target: Target) -> None:
        assert set(target.ops.cuda_kernels().split()) <= NAMES

    def test_a_name_that_is_no_kernel_is_refused(self, target: Target) -> None:
        with pytest.raises(
            RuntimeError, match=r"force_cuda_gemm: name: expected one of small .*, got marlin"
        ):
            target.ops.force_cuda_gemm("marlin")

    @pytest.mark.parametrize("gemm", GEMMS, ids=lambda gemm: gemm.name)
    @pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: "w{}a{}".format(*scheme))
    def test_a_forced_gemm(
        self, target: Target, capability: int, gemm: Gemm, scheme: tuple[int, int]
    ) -> None:
        self.require(target, gemm.name)
        weight_bits, act_bits = scheme
        runs = scheme in gemm.schemes and capability in gemm.capabilities
        for outputs, inputs in self.shapes if runs else self.shapes[:1]:
            for tokens in [t for t in self.tokens if t <= gemm.most_tokens]:
                for dtype in gemm.dtypes:
                    layer = target.layer(outputs, inputs, -1, weight_bits, act_bits, dtype)
                    x = target.randn(tokens, inputs, dtype=dtype)
                    with self.forced(target, gemm.name):
                        if not runs:
                            with pytest.raises(
                                RuntimeError,
                                match=f"linear: {gemm.name}: this kernel was forced; it needs",
                            ):
                                target.linear(layer, x, 32)
                            return
                        assert_same(target.linear(layer, x, 32), layer.expected(x, 32))

    @pytest.mark.parametrize(
        "gemm", [gemm for gemm in GEMMS if gemm.groups], ids=lambda gemm: gemm.name
    )
    @pytest.mark.parametrize("act_bits", [4, 8])
    def test_a_forced_gemm_with_groups(
        self, target: Target, capability: int, gemm: Gemm, act_bits: int
    ) -> None:
        self.require(target, gemm.name)
        if capability not in gemm.capabilities:
            pytest.skip("for other architectures, which test_a_forced_gemm asserts")
        for outputs, inputs, group_size in self.groups:
            for tokens in [t for t in self.tokens if t <= gemm.most_tokens]:
                for dtype in gemm.dtypes:
                    layer = target.layer(outputs, inputs, group_size, 4, act_bits, dtype)
                    x = target.randn(tokens, inputs, dtype=dtype)
                    with self.forced(target, gemm.name):
                        assert_same(target.linear(layer, x), layer.expected(x))

    @pytest.mark.parametrize(
        ("name", "change", "needed"),
        [
            ("small", {"tokens": 17}, "at most 16 tokens"),
            ("cutlass_sm80_32x64", {"group_size": 32}, "4-bit weights without groups"),
            ("cutlass_sm90_128x32", {"group_size": 32}, "4-bit weights without groups"),
            ("cutlass_sm90_s8_128x64", {}, "8-bit weights, or 4-bit ones with groups"),
            ("cutlass_sm80_32x64", {"dtype": torch.float32}, "16-bit outputs"),
            ("cutlass_sm80_32x64", {"outputs": 33}, "outputs in multiples of 8"),
            ("cutlass_sm90_128x32", {"outputs": 33}, "outputs in multiples of 8"),
            (
                "cutlass_sm90_128x32",
                {"bias": torch.float32},
                "16-bit outputs and a bias of their dtype",
            ),
        ],
    )
    def test_a_forced_gemm_names_what_it_needs(
        self, target: Target, capability: int, name: str, change: dict[str, Any], needed: str
    ) -> None:
        self.require(target, name)
        if capability not in next(gemm for gemm in GEMMS if gemm.name == name).capabilities:
            needed = "a GPU of sm_"
        c: dict[str, Any] = {
            "tokens": 1,
            "outputs": 40,
            "group_size": -1,
            "dtype": torch.float16,
            "bias": torch.float16,
        } | change
        if c["dtype"] == torch.float32:
            c["bias"] = torch.float32
        layer = target.layer(c["outputs"], 96, c["group_size"], 4, 4, c["bias"])
        with (
            self.forced(target, name),
            pytest.raises(
                RuntimeError, match=f"linear: {name}: this kernel was forced; .*{needed}"
            ),
        ):
            target.linear(layer, target.randn(c["tokens"], 96, dtype=c["dtype"]))

    @pytest.mark.parametrize("name", EXPERTS)
    @pytest.mark.parametrize(
        ("weight_bits", "act_bits", "group_size"),
        [*((*scheme, -1) for scheme in SCHEMES), (4, 4, 32), (4, 8, 32)],
    )
    def test_forced_experts(
        self, target: Target, name: str, group_size: int, weight_bits: int, act_bits: int
    ) -> None:
        for dtype in FLOATS:
            given, gate_up, down = target.experts(70, 2, 3, 64, 96, weight_bits, dtype, group_size)
            packed: list[Any] = target.packed_experts((gate_up, down), weight_bits)
            numbers: list[Any] = [target.prepare(32), CLIP, act_bits, weight_bits]
            arguments: list[Any] = [*given, *packed, *numbers, group_size]
            with self.forced(target, name):
                got = grouped_experts(target.ops, *arguments)
            defined: list[Any] = [*given, gate_up, down, *numbers]
            assert_same(got, reference.experts(*defined))

    @pytest.mark.parametrize(
        ("name", "producer", "inputs", "block"), ROWS, ids=[name for name, *_ in ROWS]
    )
    @pytest.mark.parametrize("bits", [4, 8])
    def test_a_kernel_that_quantizes(
        self, target: Target, name: str, producer: str, inputs: int, block: int, bits: int
    ) -> None:
        prepared = target.prepare(block) if block else 0
        assert target.ops.cuda_quant_kernel(producer, inputs, prepared, target.index) == name
        for dtype in self.row_dtypes:
            x = target.randn(
                self.row_count, inputs * (2 if producer == "silu_mul" else 1), dtype=dtype
            )
            refusal = ""
            try:
                got = self.quantize(target, producer, x, prepared, bits)
            except RuntimeError as error:
                refusal = str(error)
            if refusal:
                refused = re.search(
                    r"fit into the (\d+) bytes of shared memory .* which take (\d+)", refusal
                )
                assert refused is not None, refusal
                assert int(refused[1]) < int(refused[2])
            elif producer == "silu_mul":
                assert_same_codes(got, reference.silu_mul_hadamard_quant(x, block, CLIP, bits))
            elif producer == "rms_norm":
                assert_same_codes(got, reference.rms_norm_quant(x, None, EPSILON, CLIP, bits)[:2])
            elif block:
                assert_same_codes(got, reference.hadamard_quant(x, block, CLIP, bits))
            else:
                assert_same_codes(got, reference.quant(x, CLIP, bits))

    @staticmethod
    def quantize(
        target: Target, producer: str, x: torch.Tensor, block: int, bits: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales by the producer's op."""
        if producer == "silu_mul":
            return target.ops.silu_mul_hadamard_quant(x, block, CLIP, bits)
        if producer == "rms_norm":
            return target.ops.rms_norm_quant(x, None, EPSILON, CLIP, bits, None)
        return (
            target.ops.hadamard_quant(x, block, CLIP, bits)
            if block
            else target.ops.quant(x, CLIP, bits)
        )

    @staticmethod
    def require(target: Target, name: str) -> None:
        """Skip a kernel of another architecture that this build leaves out."""
        if name not in target.ops.cuda_kernels().split():
            pytest.skip(f"{name} is not part of this build, which is for other architectures")
