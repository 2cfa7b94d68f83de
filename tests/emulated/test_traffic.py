# SPDX-License-Identifier: Apache-2.0
"""Global bytes that the kernels ask for, against the least that their operands and results
allow."""

import pytest
import torch
from emulator import INT8, PACKED, Emulator, packed_groups

from smoothrot_vllm import reference
from smoothrot_vllm.hadamard import factorize


@pytest.mark.parametrize(
    ("size", "block"), [(4096, 0), (8192, 8192), (14336, 14336), (1536, 1536), (11008, 11008)]
)
@pytest.mark.parametrize(("producer", "bits", "form"), [("", 4, PACKED), ("silu_mul", 4, INT8)])
def test_quantize_kernels_move_their_rows_once(
    emulator_int4: Emulator, size: int, block: int, producer: str, bits: int, form: int
) -> None:
    tokens = 12
    x = torch.randn(tokens, size * (2 if producer else 1)).bfloat16()
    base = factorize(block or 1).base  # type: ignore[union-attr]
    sign_bytes = base // 4 * -(-base // 8) * 4
    with emulator_int4.options(multiprocessors=1):
        codes, scale = emulator_int4.quant(x, 0.9, bits, form, block=block, producer=producer)
        counters = emulator_int4.counters()
    floor = x.nbytes + codes.nbytes + scale.nbytes + sign_bytes
    assert counters.launches == 1
    assert floor <= counters.loaded + counters.stored <= 1.05 * floor


@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm_quant_moves_its_rows_once(emulator_int4: Emulator, with_residual: bool) -> None:
    x = torch.randn(4, 4096).bfloat16()
    residual = torch.randn(4, 4096).bfloat16() if with_residual else None
    with emulator_int4.options():
        codes, scale = emulator_int4.quant(
            x, 0.9, 4, producer="rms_norm", residual=residual, epsilon=1e-6
        )
        counters = emulator_int4.counters()
    floor = x.nbytes + codes.nbytes + scale.nbytes + (2 * x.nbytes if with_residual else 0)
    assert counters.launches == 1
    assert counters.loaded + counters.stored == floor


@pytest.mark.parametrize("form", [PACKED, INT8])
@pytest.mark.parametrize("group", [32, 128])
def test_gemm_small_takes_weights_and_group_scales_from_dram_once(
    emulator_int4: Emulator, group: int, form: int
) -> None:
    """Lanes of a row ask for the same word of group scales, and other warps for its neighbors: the
    cache serves nearly all of them, though the emulator runs one warp after the other."""
    tokens, outputs, inputs = 3, 256, 2048
    codes = torch.randint(-8, 8, (tokens, inputs), dtype=torch.int8)
    stored = reference.pack_int4(codes) if form == PACKED else codes
    weight = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8)
    group_scale = torch.randint(1, 16, (outputs, inputs // group), dtype=torch.uint8)
    scale, weight_scale = torch.rand(tokens), torch.rand(outputs, 1)
    with emulator_int4.options(multiprocessors=1, trace=1):
        out = emulator_int4.gemm(
            *("small", stored, scale, weight, weight_scale, torch.bfloat16),
            group_scale=group_scale,
        )
        stored_bytes = emulator_int4.counters().stored
        dram = emulator_int4.dram_loaded(weight.nbytes // 2 + 2 * stored.nbytes, 1) + stored_bytes
    floor = sum(t.nbytes for t in (stored, scale, weight, weight_scale, out))
    floor += packed_groups(weight, group_scale).nbytes - weight.nbytes
    assert floor <= dram <= 1.03 * floor


@pytest.mark.parametrize(
    ("tokens", "form", "allowed"),
    [
        (1, PACKED, 1.1),
        (5, PACKED, 1.1),
        (16, PACKED, 1.1),
        (1, INT8, 1.1),
        (8, INT8, 1.1),
        (16, INT8, 1.12),
    ],
)
def test_gemm_small_reads_each_weight_once(
    emulator_int4: Emulator, tokens: int, form: int, allowed: float
) -> None:
    """Tokens are read again for every 128 outputs, which for 16 tokens of int8 codes is the
    most: 11 % over the floor."""
    outputs, inputs = 256, 2048
    codes = torch.randint(-8, 8, (tokens, inputs), dtype=torch.int8)
    stored = reference.pack_int4(codes) if form == PACKED else codes
    weight = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8)
    scale, weight_scale, bias = (
        torch.rand(tokens),
        torch.rand(outputs, 1),
        torch.randn(outputs).bfloat16(),
    )
    with emulator_int4.options(multiprocessors=1, trace=1):
        out = emulator_int4.gemm("small", stored, scale, weight, weight_scale, torch.bfloat16, bias)
        counters, weight_bytes = emulator_int4.counters(), emulator_int4.loaded_from(weight)
        # Room for all activations and half the weights.
        cache = weight.nbytes // 2 + 2 * stored.nbytes
        dram = {
            blocks: emulator_int4.dram_loaded(cache, blocks) + counters.stored for blocks in (1, 2)
        }
        uncached = emulator_int4.dram_loaded(0, 1)
    assert weight_bytes == weight.nbytes
    floor = sum(t.nbytes for t in (stored, scale, weight, weight_scale, bias, out))
    assert floor <= counters.loaded + counters.stored <= allowed * floor
    assert all(floor <= moved <= 1.01 * floor for moved in dram.values())
    assert uncached >= counters.loaded
