# SPDX-License-Identifier: Apache-2.0
"""Every op of the CUDA library against smoothrot_vllm/reference.py: on a GPU, and on the
make-believe one of tests/cuda.

The reference computes on the target's device, too: on a GPU it takes a fraction of the time, and
its float64 sums are exact.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from awkward_rows import awkward_rows

from smoothrot_vllm import reference
from smoothrot_vllm.format import GROUP_SCALE_MAX
from smoothrot_vllm.grouped_experts import grouped_experts

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
CLIP, EPSILON = 0.9, 1e-5


@dataclass(frozen=True)
class Target:
    """Where the ops run: their namespace, the device of their tensors, and one where these must
    not be."""

    ops: Any
    device: torch.device
    elsewhere: torch.device
    prepare: Callable[[int], int]
    """Makes a Hadamard block known to the device and returns it."""

    @property
    def index(self) -> int:
        """Number of the device, as prepared rotations know it."""
        return -1 if self.device.index is None else self.device.index

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device)

    def linear(self, layer: "Layer", x: torch.Tensor, block: int = 0) -> torch.Tensor:
        """``linear`` of ``x``."""
        packed = self.ops.prepack_weight(*layer.weight, layer.weight_bits)
        prepared = self.prepare(block) if block else 0
        return self.ops.linear(x, packed, layer.scale, layer.bias, prepared, CLIP, *layer.numbers)

    def layer(
        self,
        outputs: int,
        inputs: int,
        group_size: int,
        weight_bits: int,
        act_bits: int,
        bias: torch.dtype | None,
    ) -> "Layer":
        """A random layer, per channel for a ``group_size`` of -1: codes and group scales over their
        whole range, scales that keep outputs near one."""
        top = reference.quant_max(weight_bits)
        codes = torch.randint(
            -top - 1, top + 1, (outputs, inputs), dtype=torch.int8, device=self.device
        )
        return Layer(
            reference.encode(codes, weight_bits),
            torch.rand(outputs, 1, device=self.device) * (0.1 / top),
            None if group_size == -1 else self.group_scale(outputs, inputs // group_size),
            None if bias is None else self.randn(outputs, dtype=bias),
            weight_bits,
            act_bits,
        )

    def group_scale(self, *sizes: int) -> torch.Tensor:
        """Random group scales."""
        top = GROUP_SCALE_MAX + 1
        return torch.randint(1, top, sizes, dtype=torch.uint8, device=self.device)

    def randn(self, *sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Normal values, drawn in float32."""
        return torch.randn(sizes, device=self.device).to(dtype)

    def experts(
        self,
        tokens: int,
        top_k: int,
        experts: int,
        hidden: int,
        intermediate: int,
        weight_bits: int,
        dtype: torch.dtype,
        group_size: int = -1,
    ) -> tuple[
        tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        reference.QuantizedExperts,
        reference.QuantizedExperts,
    ]:
        """``x``, weights and numbers of its experts, the last left out if it can be; codes and
        scales of both linears."""

        def stack(outputs: int, inputs: int) -> reference.QuantizedExperts:
            layers = [
                self.layer(outputs, inputs, group_size, weight_bits, 8, None)
                for _ in range(experts)
            ]
            codes, scale, groups = zip(*(layer.weight for layer in layers), strict=True)
            return (
                torch.stack(codes),
                torch.stack(scale),
                None if group_size == -1 else torch.stack(groups),
            )

        logits = self.randn(tokens, experts)
        if top_k < experts:
            logits[:, -1] = -torch.inf
        weights, chosen = logits.softmax(-1).topk(top_k)
        given = (self.randn(tokens, hidden, dtype=dtype), weights, chosen.int())
        return given, stack(2 * intermediate, hidden), stack(hidden, intermediate)

    def packed_experts(
        self, linears: Iterable[reference.QuantizedExperts], weight_bits: int
    ) -> list[torch.Tensor]:
        """Of each linear what ``gemm_experts`` takes: packed weights and scales."""
        return [
            part
            for codes, scale, groups in linears
            for part in (self.ops.prepack_weight(codes, scale, groups, weight_bits), scale)
        ]


@dataclass(frozen=True)
class Layer:
    """A layer on the target's device."""

    stored: torch.Tensor
    scale: torch.Tensor
    group_scale: torch.Tensor | None
    bias: torch.Tensor | None
    weight_bits: int
    act_bits: int

    @property
    def weight(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Codes and both scales."""
        return self.stored, self.scale, self.group_scale

    @property
    def numbers(self) -> tuple[int, int, int]:
        """Bits of activations and of weights, inputs of a group."""
        inputs = self.stored.shape[1] * (2 if self.weight_bits == 4 else 1)
        group_size = -1 if self.group_scale is None else inputs // self.group_scale.shape[1]
        return self.act_bits, self.weight_bits, group_size

    def expected(self, x: torch.Tensor, block: int = 0) -> torch.Tensor:
        """What ``linear`` must give for ``x``."""
        bits = self.act_bits
        quantized = (
            reference.hadamard_quant(x, block, CLIP, bits)
            if block
            else reference.quant(x, CLIP, bits)
        )
        arguments: list[Any] = [*quantized, *self.weight, self.bias, x.dtype, bits]
        return reference.gemm(*[*arguments, self.weight_bits])


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, save the bits of a NaN."""
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def assert_same_codes(
    got: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Codes and scales bit for bit."""
    assert_same(got[0], expected[0])
    assert_same(got[1], expected[1])


class OpsContract:
    """Tests that a subclass runs on the target that its fixture ``target`` names, on shapes that
    suit that target."""

    inputs = (32, 192, 1056)
    rotations = ((192, 96), (192, 192), (256, 256), (1024, 64))
    """Inputs, block."""
    gemms = ((1, 40, 64), (16, 33, 96), (17, 48, 128), (70, 40, 96))
    """Tokens, outputs, inputs."""
    linears = gemms
    groups = ((1, 40, 96, 32), (9, 33, 320, 64), (20, 40, 128, 64), (260, 40, 384, 128))
    """Tokens, outputs, inputs, inputs of a group."""
    experts = ((1, 2, 5, 64, 96), (70, 2, 3, 64, 96), (9, 8, 12, 32, 64))
    """Tokens, top_k, experts, hidden size, intermediate size."""

    @pytest.fixture(autouse=True)
    def _seed(self) -> None:
        torch.manual_seed(0)

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_quant(self, target: Target, dtype: torch.dtype, bits: int) -> None:
        for inputs in self.inputs:
            x = target.put(awkward_rows(inputs, dtype))
            assert_same_codes(target.ops.quant(x, CLIP, bits), reference.quant(x, CLIP, bits))

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_hadamard_quant(self, target: Target, dtype: torch.dtype, bits: int) -> None:
        for inputs, block in self.rotations:
            x = target.randn(5, inputs, dtype=dtype)
            got = target.ops.hadamard_quant(x, target.prepare(block), CLIP, bits)
            assert_same_codes(got, reference.hadamard_quant(x, block, CLIP, bits))

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_silu_mul_hadamard_quant(self, target: Target, dtype: torch.dtype, bits: int) -> None:
        for inputs, block in (*self.rotations, (self.inputs[-1], 0)):
            x = target.randn(3, 2 * inputs, dtype=dtype)
            prepared = target.prepare(block) if block else 0
            got = target.ops.silu_mul_hadamard_quant(x, prepared, CLIP, bits)
            assert_same_codes(got, reference.silu_mul_hadamard_quant(x, block, CLIP, bits))

    @pytest.mark.parametrize("has_residual", [False, True])
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_rms_norm_quant(self, target: Target, dtype: torch.dtype, has_residual: bool) -> None:
        for inputs in self.inputs:
            x, weight = target.randn(5, inputs, dtype=dtype), target.randn(inputs, dtype=dtype)
            residual = target.randn(5, inputs, dtype=dtype) if has_residual else None
            for own in (weight, None):
                codes, scale, expected = reference.rms_norm_quant(
                    x, own, EPSILON, CLIP, 8, residual
                )
                updated = None if residual is None else residual.clone()
                got = target.ops.rms_norm_quant(x, own, EPSILON, CLIP, 8, updated)
                assert_same_codes(got, (codes, scale))
                if updated is not None and expected is not None:
                    assert_same(updated, expected)

    @pytest.mark.parametrize(("weight_bits", "act_bits"), [(4, 4), (4, 8), (8, 4), (8, 8)])
    def test_gemm(self, target: Target, weight_bits: int, act_bits: int) -> None:
        for tokens, outputs, inputs in self.gemms:
            layer = target.layer(outputs, inputs, -1, weight_bits, act_bits, None)
            codes, scale = reference.quant(target.randn(tokens, inputs), CLIP, act_bits)
            rest: list[Any] = [None, torch.float32, act_bits, weight_bits]
            got = target.ops.gemm(codes, scale, layer.stored, layer.scale, *rest, -1)
            arguments: list[Any] = [codes, scale, *layer.weight, *rest]
            assert_same(got, reference.gemm(*arguments))

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize(("weight_bits", "act_bits"), [(4, 4), (4, 8), (8, 4), (8, 8)])
    def test_linear(
        self, target: Target, weight_bits: int, act_bits: int, dtype: torch.dtype
    ) -> None:
        for tokens, outputs, inputs in self.linears:
            layer = target.layer(outputs, inputs, -1, weight_bits, act_bits, dtype)
            x = target.randn(tokens, inputs, dtype=dtype)
            for block in (0, 32):
                assert_same(target.linear(layer, x, block), layer.expected(x, block))

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("act_bits", [4, 8])
    def test_silu_mul_linear(self, target: Target, act_bits: int, dtype: torch.dtype) -> None:
        tokens, outputs, inputs = self.linears[-1]
        layer = target.layer(outputs, inputs, 32, 4, act_bits, dtype)
        gate_up, block = target.randn(tokens, 2 * inputs, dtype=dtype), target.prepare(32)
        quantized = reference.silu_mul_hadamard_quant(gate_up, block, CLIP, act_bits)
        packed = target.ops.prepack_weight(*layer.weight, 4)
        got = target.ops.silu_mul_linear(
            gate_up, packed, layer.scale, layer.bias, block, CLIP, *layer.numbers
        )
        arguments: list[Any] = [*quantized, *layer.weight, layer.bias, dtype, act_bits, 4]
        assert_same(got, reference.gemm(*arguments))

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("act_bits", [4, 8])
    def test_linear_with_groups(self, target: Target, act_bits: int, dtype: torch.dtype) -> None:
        for tokens, outputs, inputs, group_size in self.groups:
            layer = target.layer(outputs, inputs, group_size, 4, act_bits, dtype)
            x = target.randn(tokens, inputs, dtype=dtype)
            assert_same(target.linear(layer, x), layer.expected(x))

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize(
        ("weight_bits", "act_bits", "group_size"),
        [(4, 4, -1), (4, 8, -1), (8, 8, -1), (4, 4, 32), (4, 8, 32)],
    )
    def test_experts(
        self,
        target: Target,
        weight_bits: int,
        act_bits: int,
        group_size: int,
        dtype: torch.dtype,
    ) -> None:
        for shape in self.experts:
            given, gate_up, down = target.experts(*shape, weight_bits, dtype, group_size)
            packed: list[Any] = target.packed_experts((gate_up, down), weight_bits)
            for block in (0, target.prepare(32)):
                numbers: list[Any] = [block, CLIP, act_bits, weight_bits]
                arguments: list[Any] = [*given, *packed, *numbers, group_size]
                got = grouped_experts(target.ops, *arguments)
                assert got.dtype == dtype
                defined: list[Any] = [*given, gate_up, down, *numbers]
                assert_same(got, reference.experts(*defined))

    def test_a_stack_is_packed_as_its_members_are(self, target: Target) -> None:
        for group_size in (-1, 32):
            layers = [target.layer(41, 64, group_size, 4, 8, None) for _ in range(3)]
            codes, scale = (
                torch.stack([layer.stored for layer in layers]),
                torch.stack([layer.scale for layer in layers]),
            )
            own = [layer.group_scale for layer in layers if layer.group_scale is not None]
            groups = torch.stack(own) if own else None
            members = [target.ops.prepack_weight(*layer.weight, 4) for layer in layers]
            packed = target.ops.prepack_weight(codes, scale, groups, 4)
            assert_same(packed, torch.stack(members))
            with pytest.raises(
                RuntimeError, match=r"weight_scale: expected contiguous float32 \(3, any, 1\), got"
            ):
                target.ops.prepack_weight(codes, scale[:2], groups, 4)
            if groups is not None:
                with pytest.raises(
                    RuntimeError,
                    match=r"group_scale: expected contiguous uint8 \(3, any, any\), got",
                ):
                    target.ops.prepack_weight(codes, scale, groups[:2], 4)

    @pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (0, 64), (2, 0, 64)])
    def test_linear_keeps_leading_dimensions(self, target: Target, shape: tuple[int, ...]) -> None:
        layer = target.layer(40, 64, -1, 4, 8, None)
        x = target.randn(*shape)
        y = target.linear(layer, x)
        assert y.shape == (*shape[:-1], 40)
        assert_same(y.reshape(-1, 40), layer.expected(x.reshape(-1, 64)))

    def test_no_tokens_give_no_codes(self, target: Target) -> None:
        x = target.put(torch.ones(0, 64))
        for codes, scale in (
            target.ops.quant(x, 1.0, 4),
            target.ops.hadamard_quant(x, target.prepare(64), 1.0, 4),
        ):
            assert codes.shape == (0, 32)
            assert scale.shape == (0,)

    def test_wrong_inputs_are_refused_by_name(self, target: Target) -> None:
        layer = target.layer(40, 64, -1, 4, 4, None)
        weight, scale = layer.stored, layer.scale
        x, misaligned = target.put(torch.ones(2, 64)), target.put(torch.ones(129))[1:].view(2, 64)
        away = layer.stored.to(target.elsewhere)
        cases: list[tuple[str, tuple[Any, ...]]] = [
            (
                "x: expected float32, bfloat16 or float16, got float64",
                (x.double(), weight, scale, None, 0, 1.0, 4, 4, -1),
            ),
            ("x: expected a contiguous", (x.T, weight, scale, None, 0, 1.0, 4, 4, -1)),
            (
                "x: expected data at a multiple of 16 bytes",
                (misaligned, weight, scale, None, 0, 1.0, 4, 4, -1),
            ),
            (
                "x: expected inputs in multiples of 32",
                (x[:, :48].contiguous(), weight, scale, None, 0, 1.0, 4, 4, -1),
            ),
            ("packed: expected contiguous uint8", (x, away, scale, None, 0, 1.0, 4, 4, -1)),
            (
                "bias: expected contiguous",
                (x, weight, scale, x[0, :39].contiguous(), 0, 1.0, 4, 4, -1),
            ),
            (
                "block: expected a divisor of 64, got 128",
                (x, weight, scale, None, 128, 1.0, 4, 4, -1),
            ),
            ("clip: expected 0 < clip <= 1", (x, weight, scale, None, 0, 1.5, 4, 4, -1)),
            ("bits: expected 4 or 8, got 6", (x, weight, scale, None, 0, 1.0, 6, 4, -1)),
        ]
        for message, arguments in cases:
            with pytest.raises(RuntimeError, match=f"smoothrot::linear: {message}"):
                target.ops.linear(*arguments)
