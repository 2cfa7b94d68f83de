# SPDX-License-Identifier: Apache-2.0
"""Plain-torch definition of every op: what a kernel must compute, bit for bit where it says so.

Slow on purpose. The kernels' tests, the converter's checks and the served model's tests all compare
against these functions.
"""

from typing import Literal

import torch

from smoothrot_vllm.errors import UnsupportedModelError
from smoothrot_vllm.hadamard import base_matrix, factorize

QUANT_MIN_SCALE = 2.0**-100
"""A row whose scale would fall below this is treated as all zero and gets scale 1."""


def quant_max(bits: int) -> int:
    """Largest code of a symmetric signed quantizer: 7 for 4 bits, 127 for 8; the smallest is
    ``-quant_max - 1``."""
    return (1 << (bits - 1)) - 1


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Pack int8 codes in [-8, 7], ``(..., K)`` with K even, to uint8 ``(..., K/2)``: low nibble
    = even index."""
    nibbles = codes.to(torch.uint8) & 0xF
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`pack_int4`: uint8 ``(..., K/2)`` to int8 ``(..., K)`` in [-8, 7]."""
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2).to(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


def encode(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes as they are stored: uint8 nibble pairs for 4 bits, int8 as it is for 8."""
    return pack_int4(codes) if bits == 4 else codes.to(torch.int8)


def decode(stored: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of :func:`encode`: int8 ``(..., K)``."""
    return unpack_int4(stored) if bits == 4 else stored


def hadamard_transform(x: torch.Tensor, block: int) -> torch.Tensor:
    """Unnormalized ``x (I (x) H_base (x) H_power)``.

    Dividing by ``sqrt(block)`` makes it orthonormal. The order of float additions is part of the
    definition: butterflies at strides 1, 2, 4 ... within each run of ``power`` values, then, for a
    base above 1, the sum from left to right over groups of four runs, each ``(+-r0 +-r1) + (+-r2
    +-r3)``.

    Args:
        x: ``(..., K)`` of any float dtype.
        block: a Hadamard order, base * power; divides K.

    Returns:
        ``(..., K)``, float64 for float64, else float32.

    Raises:
        UnsupportedModelError: ``block`` is no such order, or does not divide K.
    """
    factors = factorize(block)
    if factors is None or x.shape[-1] % block:
        raise UnsupportedModelError(
            f"block {block}: expected a Hadamard order that divides {x.shape[-1]}"
        )
    y = x if x.dtype == torch.float64 else x.float()
    stride = 1
    while stride < factors.power:
        pairs = y.reshape(-1, 2, stride)
        y = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), dim=1)
        stride *= 2
    if factors.base > 1:
        runs = y.reshape(-1, factors.base, 1, factors.power)
        signs = base_matrix(factors.base).to(y)
        y = torch.zeros_like(runs[:, 0])
        for b in range(0, factors.base, 4):
            r = [runs[:, i] * signs[i, :, None] for i in range(b, b + 4)]
            y = y + ((r[0] + r[1]) + (r[2] + r[3]))
    return y.reshape(x.shape)


def quant(x: torch.Tensor, clip: float, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Dynamic symmetric per-token quantization.

    Args:
        x: ``(T, K)``, float32, bfloat16 or float16; K even.
        clip: the scale is ``max|x| * (clip / quant_max)``, 0 < clip <= 1.
        bits: 4 or 8.

    Returns:
        codes ``(T, K/2)`` uint8 or ``(T, K)`` int8, and scale ``(T,)`` float32. A zero row gets
        scale 1; a row with a NaN or an infinity gets scale NaN and zero codes, so that its output
        is NaN.
    """
    return _quant_float32(x.float(), clip, bits, 1.0)


def hadamard_quant(
    x: torch.Tensor, block: int, clip: float, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`quant` of ``x`` rotated by ``I (x) H_block``, orthonormal: QuaRot's online rotation
    (arXiv 2404.00456).

    Args:
        x, clip, bits: as for :func:`quant`.
        block: a Hadamard order that divides K.

    Returns:
        codes and scale as from :func:`quant`.

    Raises:
        UnsupportedModelError: see :func:`hadamard_transform`.
    """
    norm = float(torch.tensor(block, dtype=torch.float64).rsqrt().to(torch.float32))
    return _quant_float32(hadamard_transform(x, block), clip, bits, norm)


def _quant_float32(
    y: torch.Tensor, clip: float, bits: int, norm: float
) -> tuple[torch.Tensor, torch.Tensor]:
    top = quant_max(bits)
    factor = torch.tensor(clip / top, dtype=torch.float32)
    scale = y.abs().amax(dim=-1) * factor
    finite = scale.isfinite()
    scale = torch.where(finite & (scale < QUANT_MIN_SCALE), 1.0 / norm, scale)
    codes = (y * (1.0 / scale)[:, None]).round().clamp(-top - 1, top)
    codes = torch.where(finite[:, None], codes, 0.0).to(torch.int8)
    scale = torch.where(finite, scale * norm, torch.nan)
    return encode(codes, bits), scale


def pack_group_scale(group_scale: torch.Tensor) -> torch.Tensor:
    """Group scales as they are stored: uint8 ``(..., G)`` in [0, 15] to uint8 ``(..., ceil(G/2))``,
    low nibble = even group, 0 past the last."""
    padded = torch.nn.functional.pad(group_scale, (0, group_scale.shape[-1] % 2))
    return padded[..., 0::2] | (padded[..., 1::2] << 4)


def unpack_group_scale(stored: torch.Tensor, groups: int) -> torch.Tensor:
    """Inverse of :func:`pack_group_scale`: uint8 ``(..., groups)``, contiguous."""
    both = torch.stack((stored & 0xF, stored >> 4), dim=-1).flatten(-2)
    return both[..., :groups].contiguous()


def scaled_codes(weight: torch.Tensor, group_scale: torch.Tensor | None, bits: int) -> torch.Tensor:
    """``code * group_scale``, int8 ``(..., K)``: what a weight is in units of its channel's scale.

    Args:
        weight: stored codes ``(..., K/2)`` uint8 (4 bits) or ``(..., K)`` int8 (8 bits).
        group_scale: uint8 ``(..., G)`` in [1, 15], G groups of K/G consecutive inputs, of 4-bit
            weights; or None.
    """
    codes = decode(weight, bits)
    if group_scale is None:
        return codes
    grouped = codes.unflatten(-1, (group_scale.shape[-1], -1))
    return (grouped * group_scale.to(torch.int8)[..., None]).flatten(-2)


def accumulate(
    codes: torch.Tensor,
    weight: torch.Tensor,
    group_scale: torch.Tensor | None,
    act_bits: int,
    weight_bits: int,
) -> torch.Tensor:
    """Exact sums of products of codes and :func:`scaled_codes`.

    Args:
        codes: stored ones of inputs, ``(T, K/2)`` uint8 (4 bits) or ``(T, K)`` int8 (8 bits).
        weight: stored ones of weights, ``(N, K/2)`` uint8 or ``(N, K)`` int8.
        group_scale: uint8 ``(N, G)``, or None.

    Returns:
        int32 ``(T, N)``.
    """
    weights = scaled_codes(weight, group_scale, weight_bits)
    return (decode(codes, act_bits).double() @ weights.double().T).to(torch.int32)


def gemm(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    act_bits: int,
    weight_bits: int,
) -> torch.Tensor:
    """``y = accumulator * weight_scale * scale + bias``, float32 epilogue from left to right,
    rounded once to ``out_dtype``.

    Args:
        codes, scale: from :func:`quant` or :func:`hadamard_quant`.
        weight: stored codes ``(N, K/2)`` uint8 (4 bits) or ``(N, K)`` int8 (8 bits).
        weight_scale: float32 ``(N, 1)``.
        group_scale: uint8 ``(N, G)`` in [1, 15] of G groups of K/G consecutive inputs, or None.
        bias: ``(N,)`` of any float dtype, or None.

    Returns:
        ``(T, N)`` in ``out_dtype``.
    """
    sums = accumulate(codes, weight, group_scale, act_bits, weight_bits).float()
    y = sums * weight_scale.flatten() * scale[:, None]
    if bias is not None:
        y = y + bias.float()
    return y.to(out_dtype)


def dequantize_weight(
    weight: torch.Tensor, weight_scale: torch.Tensor, group_scale: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """The weights that codes and scales stand for.

    Args:
        weight, weight_scale, group_scale: as for :func:`gemm`.

    Returns:
        float32 ``(N, K)``.
    """
    return scaled_codes(weight, group_scale, bits).float() * weight_scale


def silu_mul_hadamard_quant(
    gate_up: torch.Tensor, block: int, clip: float, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`hadamard_quant` of ``silu(gate) * up``.

    SiLU and product are each rounded to the dtype of ``gate_up``, as torch and vLLM's SiluAndMul do
    outside a compiled graph: in bfloat16 and float16 these are their bits for every gate above
    -88.5, below which SiLU is under 1e-36 in magnitude either way.

    Args:
        gate_up: ``(T, 2 K)``, gate before up, float32, bfloat16 or float16.
        block: as for :func:`hadamard_quant`; 0 leaves the rotation out.
        clip, bits: as for :func:`quant`.

    Returns:
        codes and scale as from :func:`quant`.

    Raises:
        UnsupportedModelError: see :func:`hadamard_transform`.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    silu = gate.float() / (1.0 + _exp(-gate.float()))
    x = silu.to(gate_up.dtype) * up
    return hadamard_quant(x, block, clip, bits) if block else quant(x, clip, bits)


Activation = Literal["silu", "swigluoai"]
"""What makes one of an expert's gate and up; vLLM's names."""
SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0
"""Of ``swigluoai``: factor within the sigmoid, bound of gate and up."""


def swigluoai_hadamard_quant(
    gate_up: torch.Tensor, block: int, clip: float, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`hadamard_quant` of ``(up + 1) * (gate / (1 + exp(-1.702 * gate)))``, of a gate of at
    most 7 and an up held in [-7, 7]: gpt-oss' activation, in float32 and rounded once to the dtype
    of ``gate_up``.

    Arguments, results and errors are those of :func:`silu_mul_hadamard_quant`.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    glu = gate / (1.0 + _exp(-(gate * SWIGLU_ALPHA)))
    x = ((up + 1.0) * glu).to(gate_up.dtype)
    return hadamard_quant(x, block, clip, bits) if block else quant(x, clip, bits)


QuantizedExperts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Codes, scales and group scales of one linear of all experts, stacked."""


def experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    gate_up: QuantizedExperts,
    down: QuantizedExperts,
    block: int,
    clip: float,
    act_bits: int,
    weight_bits: int,
    biases: tuple[torch.Tensor, torch.Tensor] | None = None,
    activation: Activation = "silu",
) -> torch.Tensor:
    """Each token's weighted sum over its experts of ``down(act(gate(x), up(x)))``, every linear
    quantized as in :func:`gemm`.

    What gate and up give is rounded to the dtype of ``x``, and so is the activation, see
    :func:`silu_mul_hadamard_quant` and :func:`swigluoai_hadamard_quant`; what down gives is weighed
    and summed in float32, in the order of the experts, and rounded once.

    Args:
        x: ``(T, K)``, float32, bfloat16 or float16.
        weights: of each token's experts, float32 ``(T, top_k)``.
        chosen: their numbers, integers ``(T, top_k)`` from 0 to E - 1, of one token all different.
        gate_up: stored codes of gate above up, ``(E, 2 F, K/2)`` uint8 or ``(E, 2 F, K)`` int8;
            float32 scales ``(E, 2 F, 1)``; group scales uint8 ``(E, 2 F, G)`` or None.
        down: the same of down, codes ``(E, N, F/2)`` or ``(E, N, F)``, scales ``(E, N, 1)`` and
            group scales ``(E, N, G)`` or None.
        block: Hadamard block that rotates down's input, 0 for none.
        clip: of both inputs.
        biases: of gate above up, ``(E, 2 F)``, and of down, ``(E, N)``, of any float dtype.

    Returns:
        ``(T, N)`` in the dtype of ``x``.
    """
    codes, scale = quant(x, clip, act_bits)
    activate = swigluoai_hadamard_quant if activation == "swigluoai" else silu_mul_hadamard_quant
    total = torch.zeros(x.shape[0], down[0].shape[1], device=x.device)
    bits = (act_bits, weight_bits)
    for expert in range(len(gate_up[0])):
        w13, w2 = _expert_of(gate_up, expert), _expert_of(down, expert)
        token, place = (chosen == expert).nonzero(as_tuple=True)
        b13, b2 = (None, None) if biases is None else (bias[expert] for bias in biases)
        both = gemm(codes[token], scale[token], *w13, b13, x.dtype, *bits)
        own, own_scale = activate(both, block, clip, act_bits)
        y = gemm(own, own_scale, *w2, b2, torch.float32, *bits)
        total.index_add_(0, token, y * weights[token, place, None])
    return total.to(x.dtype)


def _expert_of(linear: QuantizedExperts, expert: int) -> QuantizedExperts:
    codes, scale, group_scale = linear
    return codes[expert], scale[expert], None if group_scale is None else group_scale[expert]


EXP_COEFFICIENTS = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)
"""Taylor coefficients of exp, highest degree first: for ``|r| <= ln(2) / 2`` the remainder is
below float32's last place."""


def _exp(x: torch.Tensor) -> torch.Tensor:
    """``exp(x)`` in float32, the same bits on every device: x is held in [-87, 88], each
    operation is rounded once."""
    x = x.clamp(-87.0, 88.0)
    n = (x * 1.4426950408889634).round()
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    y = torch.full_like(r, EXP_COEFFICIENTS[0])
    for coefficient in EXP_COEFFICIENTS[1:]:
        y = y * r + coefficient
    return y * ((n.to(torch.int32) + 127) << 23).view(torch.float32)


NORM_ACCUMULATORS = 2048
NORM_VECTOR = 8


def rms_norm_quant(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    clip: float,
    bits: int,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """:func:`quant` of ``x / sqrt(mean(x ** 2) + epsilon) * weight``, in float32.

    The order of additions is part of the definition: accumulator i of ``NORM_ACCUMULATORS`` sums
    the squares of values i, i + NORM_ACCUMULATORS ... from left to right, then neighboring
    accumulators are added pairwise.

    Args:
        x: ``(T, K)``, float32, bfloat16 or float16; K a multiple of ``NORM_VECTOR``.
        weight: ``(K,)`` of any float dtype, or None for ones.
        epsilon: added to the mean.
        clip, bits: as for :func:`quant`.
        residual: ``(T, K)`` of x's dtype, or None: x is added to it first and the sum rounded to
            that dtype.

    Returns:
        codes and scale as from :func:`quant`, and the new residual or None.
    """
    if residual is not None:
        residual = (x.float() + residual.float()).to(x.dtype)
    values = (x if residual is None else residual).float()
    tokens, size = values.shape
    squares = torch.nn.functional.pad(values * values, (0, -size % NORM_ACCUMULATORS))
    sums = torch.zeros(tokens, NORM_ACCUMULATORS, device=x.device)
    for sweep in squares.reshape(tokens, -1, NORM_ACCUMULATORS).unbind(1):
        sums = sums + sweep
    while sums.shape[1] > 1:
        sums = sums[:, 0::2] + sums[:, 1::2]
    # torch's float32 square root is not rounded to nearest; by way of float64 it is.
    root = (sums * (1.0 / size) + epsilon).double().sqrt().float()
    normed = values * (1.0 / root)
    codes, scale = quant(normed if weight is None else normed * weight.float(), clip, bits)
    return codes, scale, residual
